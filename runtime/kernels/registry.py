"""The kernels by name. Torch-free: what a kernel consists of is imported when it is asked for.

Adding a kernel is a folder and a line in `KERNELS`. A folder `runtime/kernels/<folder>/` has

* `reference.py` and `kernel.py`: a function `<name>` in each, of the same arguments; kernel.py's takes `tiling=` too;
* `tilings.py`: `tilings(target, problem) -> tuple[Tiling, ...]`, the default first;
* `inputs.py`: `inputs(problem, dtype, device, seed=0) -> dict[str, Any]`, the arguments of both.

A kernel that is not named like its folder appends its name: `embed` in `residual_norm/` has `tilings_embed` and
`inputs_embed`. Two optional things of inputs.py concern `runtime.kernels.check`, which compares returned values and
changed arguments, floating-point ones by relative norm, all others for equality:

* `outputs` (`outputs_<name>`), a tuple: names of the returned values (default: a NamedTuple's fields, or their index);
* `errors(arguments, expected, found) -> dict[str, float]` (`errors_<name>`): errors in place of the usual ones, by the
  name of an output, where equality is too strict (an argmax of values that are within rounding of each other). It gets
  the arguments, what the reference and what the kernel returned; the kernel's tolerance applies to what it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hardware.files import known
from runtime.kernels.problem import Problem
from runtime.kernels.target import Target, Tiling


@dataclass(frozen=True)
class Kernel:
    """One operator of the fused forward.

    operator: the name that predictions and measurements know it by. does: in a line. folder: below runtime/kernels,
    default the name.
    scratch: arguments that the kernel may overwrite, so that what they hold afterwards says nothing.
    """

    name: str
    operator: str
    does: str = ""
    folder: str = ""
    scratch: tuple[str, ...] = ()

    def _part(self, module: str, name: str, *default: Any) -> Any:
        folder = self.folder or self.name
        suffixed = name if folder == self.name or name == self.name else f"{name}_{self.name}"
        return getattr(import_module(f"runtime.kernels.{folder}.{module}"), suffixed, *default)

    def reference(self) -> Callable[..., Any]:
        """The plain torch function."""
        return self._part("reference", self.name)  # type: ignore[no-any-return]

    def triton(self) -> Callable[..., Any]:
        """The function that launches the Triton kernel; takes `tiling=` besides. Imports triton."""
        return self._part("kernel", self.name)  # type: ignore[no-any-return]

    def tilings(self, target: Target, problem: Problem) -> tuple[Tiling, ...]:
        """The candidates for this architecture and problem, the default first. Some may turn out not to fit."""
        return self._part("tilings", "tilings")(target, problem)  # type: ignore[no-any-return]

    def inputs(self, problem: Problem, dtype: Any, device: Any, seed: int = 0) -> dict[str, Any]:
        """Arguments for a problem: random, or on the device "meta" of the right shapes only. dtype: a torch dtype."""
        return self._part("inputs", "inputs")(problem, dtype, device, seed=seed)  # type: ignore[no-any-return]

    def output_names(self) -> tuple[str, ...]:
        """Names of what the kernel returns, where its folder gives any."""
        return tuple(self._part("inputs", "outputs", ()))

    def errors(self, arguments: dict[str, Any], expected: Any, found: Any) -> dict[str, float]:
        """The kernel's own judgement of some outputs, by name."""
        judge = self._part("inputs", "errors", None)
        return {} if judge is None else judge(arguments, expected, found)


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("embed", "embedding", "token embeddings, scaled, as the first residual", folder="residual_norm"),
        Kernel("residual_norm", "norms_residual", "residual scaling and RMSNorm", scratch=("residual",)),
        Kernel("cca", "cca", "convolutions, means, L2 norm, key temperature and RoPE; writes the cache"),
        Kernel("attention", "attention", "all slots of a sequence over its cached keys and values, split by keys"),
        Kernel("router", "router", "down-projection, state, norm, MLP, softmax and the choice of an expert"),
        Kernel("experts", "experts", "gate, up, SiLU and down of the experts that are hit"),
        Kernel(
            "grouped_experts",
            "experts",
            "the same as vLLM and SGLang tile it, to write their tile files; not in our engine",
        ),
        Kernel(
            "draw", "sampler", "a token from each row of logits, without probabilities in memory", folder="acceptance"
        ),
        Kernel("verify", "sampler", "accept or reject drafts, and draw where one is rejected", folder="acceptance"),
    )
}


def kernel(name: str) -> Kernel:
    """The kernel of this name; UserError names the known ones."""
    if name not in KERNELS:
        raise known("kernel", name, KERNELS)
    return KERNELS[name]
