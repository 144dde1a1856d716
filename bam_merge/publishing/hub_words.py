"""What goes wrong when a folder is pushed to the hub, in words with the way out: never a word of the server's, an address or a token."""

from bam_merge.hub_id import HubId
from bam_merge.sources.hub.words import LOGIN

AGAIN = "Run again; what was uploaded is kept by the hub, and is not sent again"


MAKE = "make the model"


NOT_LOGGED_IN = "{}: nobody is logged in here, and a push needs a token that may write. Log in: " + LOGIN + "."


def answered(of: HubId, status: int, doing: str, code: str = "") -> str:
    """What an answer from 400 on means, while `doing` something."""
    where = f"{of}: {doing}"
    org = of.repo.partition("/")[0]
    if status == 401:
        return f"{where}: the hub does not accept the token that was sent (401). Log in again with one that may write: {LOGIN}."
    if status == 403:
        return f"{where}: the hub refuses (403): the token in use may not write to {org}. Make one that may, or push to a name of your own."
    if status == 404:
        what = f"revision {of.revision!r}" if code == "RevisionNotFound" else f"account or model {of.repo}"
        return f"{where}: the hub has no such {what}, or the token in use may not see it (404). Look at the name and the token."
    if status == 409 and doing == MAKE:
        return f"{where}: it is there, and the token in use may not see it (409). Push to another name, or log in with one that may."
    if status in (409, 412):
        return f"{where}: somebody else changed this model meanwhile (the hub answers {status}). This push changed nothing; run again."
    if status == 413:
        return f"{where}: too large for this hub (413). Merge again with a smaller output.max_shard_size."
    if status == 429:
        return f"{where}: the hub has had too many requests from here (429). {AGAIN}, in a while."
    if status >= 500 or status in (408, 425):
        return f"{where}: the hub has a fault of its own (it answers {status}). {AGAIN}."
    return f"{where}: the hub refuses the request (it answers {status}). Is huggingface_hub up to date, and HF_ENDPOINT right?"


def broke(of: HubId, doing: str, endpoint: str, kind: str) -> str:
    """A request without an answer, by the name of the error."""
    if "Timeout" in kind:
        what = f"no answer from {endpoint} in time"
    elif kind == "ConnectError":
        what = f"{endpoint} could not be reached"
    else:
        what = f"the connection to {endpoint} broke off"
    return f"{of}: {doing}: {what}. Is the network up? {AGAIN}."


def unlike(of: HubId, names: str) -> str:
    return f"{of}: what the hub now has is not what was sent: {names}. Look at it there, and push again."
