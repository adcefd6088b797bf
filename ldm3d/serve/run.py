"""Starting the page: the address, who may reach it, and a first volume, so that nobody waits for the first one."""

import ipaddress
import secrets
import socket
import time

import uvicorn

from ldm3d.errors import InputError
from ldm3d.serve.app import application
from ldm3d.serve.asked import Asked
from ldm3d.serve.safety import LOOPBACK, Guarded
from ldm3d.serve.studio import Job, Studio


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def guarded(studio: Studio, host: str, token: str | None = None) -> tuple[Guarded, str | None]:
    """The application for an address, and its token: None on loopback, else a new one unless it is given."""
    if is_loopback(host):
        return Guarded(application(studio), LOOPBACK, token), token
    token = token or secrets.token_urlsafe(24)
    return Guarded(application(studio), None, token), token


def warm_up(studio: Studio) -> float:
    """Make a coarse volume of the middle of everything; the seconds of a second one, with another seed."""
    sampling = studio.pipeline.sampling
    row = tuple(studio.pipeline.schema.parse(studio.pipeline.schema.middle()).items())
    for seed in (0, 1):
        begin = time.perf_counter()
        asked = Asked(row, sampling.replace(steps=min(studio.preview_steps, sampling.steps), seed=seed), coarse=True)
        studio.submit(asked, Job(studio.limits.seconds)).result()
    return time.perf_counter() - begin


def serve(studio: Studio, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve the page until it is interrupted.

    Args:
        studio: of the model.
        host: address to listen at. Other than on loopback, everyone who reaches this machine and has the token may use it.
        port: 0 for any that is free.

    Raises:
        InputError: the address cannot be had.
    """
    app, token = guarded(studio, host)
    listener = listen(host, port)
    seconds = warm_up(studio)
    name, port = f"[{host}]" if ":" in host else host, listener.getsockname()[1]
    print(f"a coarse preview ({studio.preview_steps} steps) takes {seconds:.2f} s on this machine")
    if token:
        print(
            f"listening at {host}: everyone who reaches this machine and knows the token can use the page. The connection is "
            "not encrypted; an SSH tunnel to the page on loopback is safer"
        )
    else:
        print("listening on loopback: programs and users of this machine can use the page, no other machine")
    print(f"http://{name}:{port}/{f'?token={token}' if token else ''}   (Ctrl-C ends it)", flush=True)
    settings = {"log_level": "warning", "access_log": False, "timeout_keep_alive": 15, "timeout_graceful_shutdown": 3}
    config = uvicorn.Config(app, ws="none", server_header=False, h11_max_incomplete_event_size=32 * 1024, **settings)
    uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, so that nobody is refused meanwhile; InputError where it cannot be had."""
    address = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror or error}; choose another --port") from None
    return listener
