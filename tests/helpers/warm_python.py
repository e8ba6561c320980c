"""A Python that has imported torch already, for a script that starts it again and again.

`python warm_python.py --serve SOCKET` waits for others: `python -S warm_python.py SOCKET -m MODULE
ARGUMENT…`, or `-` for a program on standard input, runs in a fork of it, with the caller's standard
streams, environment and folder.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time


def ask(path: str, arguments: list[str]) -> int:
    """Let the server run this; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode()
        header = len(request).to_bytes(4, "little")
        socket.send_fds(connection, [header], [0, 1, 2])
        connection.sendall(request)
        return int(connection.recv(16) or b"1")


def serve(path: str) -> None:
    """Answer one request after the other; end with the process."""
    # What takes long: a first step of any optimizer imports dynamo.
    for module in ("torch._dynamo", "cl_optim"):
        importlib.import_module(module)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                answer(connection)
                os._exit(0)
            connection.close()
            # Those that answered earlier are done.
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass


def answer(connection: socket.socket) -> None:
    """Run what is asked for in a process of its own, which ends if the caller does."""
    header, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = b""
    while len(request) < int.from_bytes(header, "little"):
        request += connection.recv(2**16)
    child = os.fork()
    if child == 0:
        run(*json.loads(request), streams)
    connection.setblocking(False)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            return
        try:
            if connection.recv(1) == b"":
                os.kill(child, signal.SIGKILL)
        except BlockingIOError:
            time.sleep(0.005)


def run(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """Be the Python that was asked for; does not return."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(":"))
    status: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = ["-m", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
