"""The program of tests/preloaded.py: have its server run the arguments, and end as that ended. It must begin fast."""

import fcntl
import json
import os
import signal
import socket
import sys

UNHANDLED = (signal.SIGKILL, signal.SIGSTOP)


def inherited() -> list[int]:
    """The open files that whoever started this process meant it to have."""
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if not fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                found.append(number)
        except OSError:  # the listing's own
            continue
    return found


def main(path: str, arguments: list[str]) -> None:
    """Does not return. Without an answer the server has ended, and the exit code is 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    files = inherited()
    request = json.dumps([arguments, dict(os.environ), os.getcwd(), files]).encode()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(path)
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
    connection.sendall(request)
    code = int(connection.recv(8) or b"1")
    if code < 0:
        if -code not in UNHANDLED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
