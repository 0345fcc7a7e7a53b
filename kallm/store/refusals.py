"""What an S3 server or the way to it may refuse, as one sentence that names the setting to change.

The sentences are ours: a server's own words may repeat the access key or the signed request.
"""

from collections.abc import Mapping
from typing import Any

from botocore.exceptions import (
    BotoCoreError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)

from kallm.errors import KallmError, StorageUnavailable, WrongConfiguration

__all__ = ["explain_answer", "explain_silence"]

_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a pod: the Secret that the site names)"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"

_ACCESS = {
    "AccessDenied": "access is denied; give this key the rights to read, write, list and delete, or use another",
    "AccountProblem": "the account is suspended; ask the server's operator",
    "ExpiredToken": "the session token has expired; fetch new credentials",
    "InvalidAccessKeyId": f"the access key is unknown there; {_KEYS}",
    "InvalidToken": "the session token is not valid there; set AWS_SESSION_TOKEN anew or unset it",
    "RequestExpired": "the request is too old; set this machine's clock (NTP)",
    "RequestTimeTooSkewed": "the clocks differ by more than the server allows; set this machine's clock (NTP)",
    "SignatureDoesNotMatch": "the secret key is another one than the server's; set AWS_SECRET_ACCESS_KEY",
    "TokenRefreshRequired": "the session token has expired; fetch new credentials",
}

_SETTINGS = {
    "AuthorizationHeaderMalformed": f"the region is another one; {_REGION}",
    "IllegalLocationConstraintException": f"the region is another one; {_REGION}",
    "InvalidBucketName": "the server takes no bucket of that name; name an existing bucket",
    "MethodNotAllowed": "the endpoint takes no such request; set AWS_ENDPOINT_URL_S3 to the S3 address of the server",
    "ObjectParentIsFile": "a part of the key is an object itself; use another prefix",
    "NoSuchBucket": "there is no such bucket; make it, or name an existing one",
    "PermanentRedirect": f"the bucket lives in another region; {_REGION}",
}

_SERVER = {
    "ConditionalRequestConflict": "another write was under way every time; try again later",
    "InsufficientStorage": "the server is full; free some space there, or use another store",
    "InternalError": "the server failed; try again later",
    "QuotaExceeded": "the quota is used up; free some space there, or ask for more",
    "ServiceUnavailable": "the server is overloaded; try again later, with fewer cells at once",
    "SlowDown": "the server is overloaded; try again later, with fewer cells at once",
    "XMinioStorageFull": "the server is full; free some space there, or use another store",
}


def explain_answer(response: Mapping[str, Any], place: str, *, inside_cell: bool) -> KallmError:
    """Return the error for a server's refusal.

    ``place`` names endpoint, bucket and key. Refused access is a wrong configuration, but unavailable storage inside a
    cell, whose credentials may be renewed while it waits. So is every answer that no setting of ours explains.
    """
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    known = _ACCESS | _SETTINGS | _SERVER
    default = "see the server's log"
    if code not in known and status == 403:
        default = _ACCESS["AccessDenied"]
    if code not in known and status == 404:
        default = f"{_SETTINGS['NoSuchBucket']}, and see that AWS_ENDPOINT_URL_S3 is the address of an S3 server"
    sentence = f"{place}: {known.get(code, default)} (the server answered {status} {code})"
    if code in _ACCESS or status == 403:
        return _refused(sentence, inside_cell)
    if code in _SETTINGS or status == 404:
        return WrongConfiguration(sentence)
    return StorageUnavailable(sentence)


def explain_silence(error: BotoCoreError, place: str, *, inside_cell: bool) -> KallmError:
    """Return the error for a request that got no answer, or was never sent."""
    name = type(error).__name__
    endpoint = "see that AWS_ENDPOINT_URL_S3 is right and that the server runs"
    match error:
        case ProfileNotFound():
            return WrongConfiguration(f"{place}: no such profile of credentials; set AWS_PROFILE anew or unset it")
        case NoCredentialsError() | PartialCredentialsError():
            return _refused(f"{place}: no credentials, or only a part; {_KEYS}", inside_cell)
        case ParamValidationError():
            return WrongConfiguration(f"{place}: S3 takes no such bucket or key; choose another name")
        case SSLError():
            remedy = "set AWS_CA_BUNDLE to the authority's certificate, or use the address that the certificate names"
            return StorageUnavailable(f"{place}: no trusted TLS connection; {remedy}")
        case ProxyConnectionError():
            return StorageUnavailable(f"{place}: the proxy does not answer; set HTTPS_PROXY or NO_PROXY")
        case EndpointConnectionError():
            return StorageUnavailable(f"{place}: no connection (refused, or no such host); {endpoint}")
        case ConnectTimeoutError() | ReadTimeoutError():
            return StorageUnavailable(f"{place}: no answer in time; {endpoint}, and that no firewall is between")
        case ConnectionClosedError():
            return StorageUnavailable(f"{place}: the connection was closed; {endpoint}, and speaks the scheme named")
    return StorageUnavailable(f"{place}: the request failed ({name}); {endpoint}")


def _refused(sentence: str, inside_cell: bool) -> KallmError:
    return StorageUnavailable(sentence) if inside_cell else WrongConfiguration(sentence)
