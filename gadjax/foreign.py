"""What strangers have written, made harmless for a terminal; their files, unless endless; their addresses, unless nothing is sent there."""

import ipaddress
import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from gadjax.errors import UserError

TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of the direction of writing
# Where clouds give a machine its own credentials: whoever asks there from within is believed.
METADATA = ("metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal")
METADATA_ADDRESSES = [ipaddress.ip_address(each) for each in ("100.100.100.200", "fd00:ec2::254", "fd20:ce::254")]
INSIDE = (".local", ".internal", ".lan", ".localhost")  # endings of names that are known on one's own network alone
# The name of an environment variable. One that mixes both cases with digits is a key: `gsk_aB3...`.
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*|[a-z_][a-z0-9_]*|[A-Za-z_]+")
LARGEST = 2**28  # bytes of a file that is read as a whole
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def harmless(text: str) -> str:
    """Foreign text that a terminal may show.

    Control characters but line ends and tabs become pictures, so that nothing moves the cursor, sets a title or answers in the user's
    name; marks that turn the direction of writing, and what is no character, become the replacement mark.
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)  # the Control Pictures
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or character in TURNS or 0xD800 <= code < 0xE000:
        return "\ufffd"
    return character


def read_whole(path: Path, mend: str, largest: int = LARGEST, encoding: str = "utf-8") -> str:
    """The text of a file, of which no more is read than `largest` bytes.

    Raises:
        UserError: it has more, which `mend` helps against.
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > largest else file.read(largest + 1)  # a device tells no size
    if max(size, len(content)) > largest:
        raise UserError(str(path), f"has more than {largest} bytes", mend)
    return content.decode(encoding)


def is_this_machine(address: str) -> bool:
    """Whether a URL leads to this machine itself, so that no proxy lies between."""
    host = urlsplit(address).hostname or ""
    ip = _ip(host)
    return host == "localhost" or (ip is not None and ip.is_loopback)


def check_address(field: str, address: str | None) -> str | None:
    """Refuses the URL of an endpoint that prompts and a key should not be sent to, else gives it back; no name is looked up. None passes.

    Raises:
        UserError: it is no URL, holds a secret, is a link-local address or a cloud's metadata service, or would send the key unencrypted
            over the internet. Names the field.
    """
    if address is None:
        return None
    try:
        parts = urlsplit(address)
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        parts, host = None, ""
    if parts is None or parts.scheme not in ("http", "https") or not host or any(each.isspace() for each in address):
        raise UserError(field, "is no address of an endpoint", "write one like https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UserError(field, "holds a secret or a query", "write the plain address; api_key_env names where the key is")
    ip = _ip(host)
    if host in METADATA or (ip is not None and (ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip in METADATA_ADDRESSES)):
        raise UserError(field, f"{host} is no address of an endpoint but one of the machine's own network", "name the endpoint")
    inside = ip.is_private if ip is not None else "." not in host or host.endswith(INSIDE)
    if parts.scheme == "http" and not inside:
        raise UserError(field, f"http:// would send key and prompts to {host} for all to read", "write https://")
    return address


def check_variable(field: str, name: str) -> str:
    """Refuses a key where the name of the variable that holds it belongs, and never shows it; else gives the name back.

    Raises:
        UserError: it is no such name. Not ValueError, with which pydantic would show the value.
    """
    if not VARIABLE.fullmatch(name):
        what, mend = "is no name of an environment variable", "name the variable that holds the key, and write the key into no config"
        raise UserError(field, what, mend)
    return name


def _ip(host: str) -> Address | None:
    """The address that a host is, in every way in which C libraries read one (169.16689662, 0xa9fea9fe); None: it is a name."""
    try:
        found: Address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            found = ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, UnicodeEncodeError):
            return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
