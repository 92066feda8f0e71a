"""Trials whose worker was lost: they are queued again, and a worker that was not lost after all goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue a failed trial again: once when its worker was lost (what fails twice is not bad luck), always when it
    was interrupted. The new trial's "queued" names it as `retry_of`.

    Two workers may both do so: of the two trials only one can take over the lost one's claim.
    """
    how = trial.user_attrs.get("queued", {})
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    losses = how.get("losses", 0) + ("interrupted" not in trial.user_attrs)
    if params and losses <= 1 and "taken_by" not in trial.user_attrs:
        study.enqueue_trial(params, {"queued": {**how, "retry_of": trial.number, "losses": losses}})


def retry_lost(study: optuna.Study, *, running: bool) -> None:
    """Queue again what failed and was not queued since. running: also what runs, where no other worker can be."""
    trials = study.get_trials(deepcopy=False)
    retried = {t.user_attrs.get("queued", {}).get("retry_of") for t in trials}
    for trial in trials:
        if running and trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        elif trial.state != TrialState.FAIL:
            continue
        if trial.number not in retried:
            retry(study, trial)


def fail_stale(study: optuna.Study) -> None:
    """Fail the trials of workers that are gone; the storage queues them again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


@contextmanager
def unless_given_up() -> Iterator[None]:
    """End a trial quietly that others have given up, as they had not heard of this worker for so long: it is theirs."""
    try:
        with unmasked():
            yield
    except UpdateFinishedTrialError:
        pass
    except ValueError as error:
        if "Cannot tell a FAIL trial" not in str(error):
            raise


@contextmanager
def unmasked() -> Iterator[None]:
    """Raise what `Study.optimize` hides behind failures of its own: why the storage did not take the end of a trial.

    Ctrl-C in that moment too.
    """
    try:
        yield
    except (AssertionError, UnboundLocalError) as error:
        masks = str(error) == "Should not reach." or "'updated_state'" in str(error)
        if masks and error.__context__ is not None:
            raise error.__context__  # noqa: B904  # `from` would cut off its own cause
        raise
