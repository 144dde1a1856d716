"""What goes wrong with a model of the hub, in words, with the way out. Never a word of the server's, a query of an address, or a token."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from bam_merge.hub_id import HubId
from bam_merge.text import human_bytes, nearest, printable

NOT_INSTALLED = "models of the Hugging Face hub need the package huggingface_hub: pip install 'bam-merge[hub]'"


OFFLINE = "the Hugging Face hub is not asked, for HF_HUB_OFFLINE is set"


STOPPED = "another download failed, or the run was stopped"


LOGIN = "hf auth login, or set HF_TOKEN"


NO_TOKEN = "no token for the hub could be had from the login that the environment names. Log in again (hf auth login)."


BAD_TOKEN = "the token for the hub holds characters that no request can carry. Correct HF_TOKEN, or log in again (hf auth login)."


BAD_ENDPOINT = "HF_ENDPOINT is no address of a hub. Correct it, or unset it for https://huggingface.co."


NO_HUB = "{} does not answer as the Hugging Face hub does. Is HF_ENDPOINT right, and does no login page stand between?"


def shown_endpoint(endpoint: str) -> str:
    """The hub's address without user and password, which it may hold."""
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{printable((parts.netloc or '').rpartition('@')[2])}"


def nearest_of(word: str, names: Iterable[str]) -> str:
    """'Did you mean X?' as a sentence of its own, with a space before it; '' where nothing is near."""
    found = nearest(word, names).removeprefix("; ").strip()
    return f" {found[:1].upper()}{found[1:]}" if found else ""


def _file(of: HubId, name: str) -> str:
    return f"{of}: {printable(name)}" if name else str(of)


def broken(of: HubId, name: str, kind: str, endpoint: str) -> str:
    """A request that got no answer, or half of one, by the name of the error."""
    if kind == "LocalProtocolError":
        return BAD_TOKEN
    if "Timeout" in kind:
        what = f"no answer from {endpoint} in time"
    elif kind == "ConnectError":
        what = f"{endpoint} could not be reached"
    elif kind == "ProxyError":
        return f"{_file(of, name)}: the proxy refused the way to {endpoint}. Correct HTTPS_PROXY, or unset it."
    elif kind == "TooManyRedirects":
        what = f"{endpoint} leads in circles"
    else:
        what = f"the connection to {endpoint} broke off"
    return f"{_file(of, name)}: {what}. Is the network up? Run again; what was downloaded is kept."


def busy(of: HubId, status: int, wait: int | None) -> str:
    """429, 5xx and the like."""
    if status == 429:
        when = f", and asks to wait {wait} seconds" if wait else ""
        return (
            f"{of}: the hub has had too many requests from here (429){when}. Run again later; logged in ({LOGIN}), one may ask more often."
        )
    return f"{of}: the hub has a fault of its own (it answers {status}). Run again later; what was downloaded is kept."


def refused(of: HubId, name: str, status: int, code: str, logged_in: bool, bad_token: bool, near: str) -> str:
    """Any other answer from 400 on."""
    page = f"https://huggingface.co/{of.repo}"
    if bad_token:
        return f"{of}: the hub does not accept the token that was sent. Log in again ({LOGIN})."
    if code == "GatedRepo":
        then = "with the account of the token in use" if logged_in else f"then log in here: {LOGIN}"
        return f"{of}: access to this model is granted on request. Ask for it on {page}, {then}."
    if code == "RevisionNotFound":
        return f"{of}: the hub has no revision {printable(repr(of.revision or 'main'))} of {of.repo}.{near}"
    if code == "EntryNotFound":
        return f"{of}: the hub has no file {printable(name)} at this revision." + (
            " Its files changed, or it was deleted there: write another revision." if of.commit else ""
        )
    if status == 403:
        who = (
            "the token in use may not read it; one with read access can be made" if logged_in else f"log in ({LOGIN}), with access granted"
        )
        return f"{_file(of, name)}: the hub refuses (403): {who} on {page}."
    if status in (401, 404):
        hidden = "or the token in use may not see it" if logged_in else f"or it is private and nobody is logged in here ({LOGIN})"
        return f"{_file(of, name)}: the hub has no such {'file' if name else 'model'}, {hidden}.{near}"
    return f"{_file(of, name)}: the hub refuses the request (it answers {status}). Is huggingface_hub up to date, and HF_ENDPOINT right?"


# ---- files -----------------------------------------------------------------------------------------------------------------


def other_length(of: HubId, name: str, listed: int, found: int) -> str:
    return (
        f"{_file(of, name)}: the hub lists {listed:,} bytes and sends {found:,}. A proxy may have changed it; run again, or by another "
        "network."
    )


def other_etag(of: HubId, name: str, found: str, listed: str) -> str:
    return (
        f"{_file(of, name)} changed: found digest {printable(found)}, expected {listed}, as the hub lists it at this commit. A proxy may "
        "have changed it; run again, or by another network."
    )


def no_ranges(of: HubId, name: str) -> str:
    return (
        f"{_file(of, name)}: the server sends whole files only, so that headers cannot be read alone. Download it: hf download {of.repo}."
    )


def other_digest(of: HubId, name: str) -> str:
    return (
        f"{_file(of, name)}: what was downloaded is not what the hub lists (another digest), twice. Nothing of it is kept. A proxy may "
        "have changed it; run again, or by another network."
    )


def no_room(folder: str, free: int, needed: int, output: int) -> str:
    also = f", and the output on the same disk {human_bytes(output)}" if output else ""
    return (
        f"{folder}: {human_bytes(free)} free, the download takes {human_bytes(needed)}{also}. Free some space, or set HF_HUB_CACHE to a "
        "folder on a larger disk."
    )
