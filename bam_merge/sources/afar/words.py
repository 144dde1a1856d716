"""What goes wrong with a folder elsewhere, in words with the way out. Never a word of a server's or a library's: these can hold a key, or
an address with a signature."""

from bam_merge.text import printable

NO_FSSPEC = "{}: folders of {}:// need the package fsspec: pip install 'bam-merge[remote]'."

NO_CLIENT = "{}: folders of the web need the package huggingface_hub, by whose client they are read: pip install 'bam-merge[remote]'."

PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs",
    "sftp": "paramiko", "ssh": "paramiko", "hdfs": "pyarrow", "oci": "ocifs", "webdav": "webdav4", "smb": "smbprotocol",
}  # fmt: skip
"""What fsspec needs for an address, as it is called on PyPI."""

CREDENTIALS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN, where it is of a session); of a public "
    "bucket FSSPEC_S3_ANON=true; of another store than Amazon's also FSSPEC_S3_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or log in: gcloud auth application-default login; of a public bucket FSSPEC_GS_TOKEN=anon",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_CONNECTION_STRING",
    "http": "user and password of this server in ~/.netrc",
}
_LIKE = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "https": "http"}


def credentials(scheme: str) -> str:
    """Where the keys for such an address are set."""
    return CREDENTIALS.get(_LIKE.get(scheme, scheme), f"what fsspec takes for {scheme}://, in its configuration (~/.config/fsspec)")


def no_package(shown: str, scheme: str) -> str:
    package = PACKAGES.get(scheme)
    needs = (
        f"the package {package}: pip install {package}" if package else "a package that is not installed; fsspec's documentation names it"
    )
    return f"{shown}: folders of {scheme}:// need {needs}."


def no_scheme(shown: str, near: str) -> str:
    return f"{shown}: nothing is known of such addresses{near or '. Write s3://, gs://, az://, https:// or hf://, or a folder.'}"


def refused(shown: str, scheme: str, status: int | None = None) -> str:
    """401, 403, and libraries' words for them."""
    answers = f" (it answers {status})" if status else ""
    why = "there are no keys for it here, or they have expired, or may not read it"
    return f"{shown}: access is refused{answers}: {why}. Set {credentials(scheme)}."


def gone(shown: str) -> str:
    return f"{shown}: there is no such file. Look at the address; a model's folder holds config.json and its safetensors files."


def no_folder(shown: str, near: str = "") -> str:
    return f"{shown}: no such folder, or nothing in it{near or '. Look at the address.'}"


def busy(shown: str, status: int, wait: int | None) -> str:
    if status == 429:
        return f"{shown}: too many requests from here (429){f', and it asks to wait {wait} seconds' if wait else ''}. Run again later."
    return f"{shown}: the server has a fault of its own (it answers {status}). Run again later; what was merged is kept for --resume."


def broke(shown: str, kind: str) -> str:
    """A request without an answer, or with half of one, by the name of the error."""
    what = (
        "no answer in time"
        if "Timeout" in kind
        else "it could not be reached"
        if kind.startswith("Connect")
        else "the connection broke off"
    )
    return f"{shown}: {what} ({printable(kind, 60)}), again and again. Is the network up? Run again; what was merged is kept for --resume."


def short(shown: str, found: int, expected: int) -> str:
    return (
        f"{shown}: found {found:,} bytes, expected {expected:,}, again and again. A proxy may cut it; run again, or copy the folder to "
        "this machine."
    )


def no_ranges(shown: str) -> str:
    return (
        f"{shown}: the server sends whole files where a range of bytes is asked for, so that it cannot be read here. Copy the folder to "
        "this machine, and give that."
    )


def other_range(shown: str) -> str:
    return f"{shown}: the server sent other bytes than it was asked for. Copy the folder to this machine, and give that."


def other_status(shown: str, status: int) -> str:
    return f"{shown}: the server refuses the request (it answers {status}). Look at the address; or copy the folder to this machine."


def encoded(shown: str) -> str:
    return f"{shown}: the server sends it compressed, so that no range of its bytes can be told. Copy the folder to this machine."


def failed(shown: str, kind: str) -> str:
    return f"{shown}: reading it failed ({printable(kind, 60)}). Look at the address, and at fsspec's documentation of such stores."


NO_VERSION = (
    "{} gives its files neither etag nor version nor time of change: one that changes while it is merged, and keeps its size, is found "
    "by the proof alone."
)
