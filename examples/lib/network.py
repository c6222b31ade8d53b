"""Keeps servers from reading addresses in private networks, and from starting on ports that are taken."""

import http.client
import ipaddress
import socket
import urllib.request


class PublicHTTPConnection(http.client.HTTPConnection):
    """A connection to a public address, or none."""

    def connect(self):
        super().connect()
        check_public(self)


class PublicHTTPSConnection(http.client.HTTPSConnection):
    def connect(self):
        super().connect()
        check_public(self)


class PublicHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.FTPHandler):
    def http_open(self, request):
        return self.do_open(PublicHTTPConnection, request)

    def https_open(self, request):
        return self.do_open(PublicHTTPSConnection, request)

    def ftp_open(self, request):
        raise ValueError(f"{request.host}: an address redirects to ftp, which is not read")


def check_public(connection) -> None:
    # Of the connection, not of the name, which may stand for another address the next time it is looked up.
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    if not (getattr(address, "ipv4_mapped", None) or address).is_global:
        connection.close()
        raise ValueError(f"{connection.host} is in a private network, which this server does not read from")


def refuse_private_addresses() -> None:
    """Let `urllib.request.urlopen` connect to public addresses only, also where it is redirected.

    It connects by itself: what is behind a proxy could not be told.
    """
    direct = urllib.request.ProxyHandler({})
    urllib.request.install_opener(urllib.request.build_opener(direct, PublicHandler))


def check_port(host: str | None, port: int, otherwise: str) -> None:
    """Raise a ValueError if the port is taken: before the model is loaded, which may take minutes."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host or "127.0.0.1", port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror.lower()}; {otherwise}") from error
