"""What a request fails with when it could not be answered. A guest's fault is no failure: see `answers.Fault`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

_DETAILS_KEY: Final = "grpc-status-details-bin"
_NO_DETAILS: Final[Mapping[str, str]] = MappingProxyType({})


class Error(Exception):
    """A request that could not be answered.

    `code` is the gRPC status, as `"NOT_FOUND"`; `reason` the machine-readable cause from `google.rpc.ErrorInfo`, empty
    where the daemon gave none; `details` that info's metadata; `message` says what to do.
    """

    def __init__(self, message: str, *, code: str, reason: str = "", details: Mapping[str, str] = _NO_DETAILS) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.code}{', ' + self.reason if self.reason else ''})"


class InvalidArgumentError(Error):
    """A field is missing, out of range, or contradicts another."""


class NotFoundError(Error):
    """There is no such machine or vCPU."""


class FailedPreconditionError(Error):
    """The machine's source cannot do this at all, or not now."""


class UnimplementedError(Error):
    """The contract knows it, and this daemon does not yet."""


class PermissionDeniedError(Error):
    """The caller's role does not reach."""


class ResourceExhaustedError(Error):
    """A limit of the daemon is reached."""


class DeadlineExceededError(Error):
    """The deadline passed first."""


class UnavailableError(Error):
    """The daemon is stopping, or the vCPU has gone."""


class ClosedError(Error):
    """The client was closed before."""


class ConnectError(UnavailableError):
    """Nothing answers at the address, or not in the way that was asked for."""


_CLASSES: Final[Mapping[grpc.StatusCode, type[Error]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def from_rpc(failure: grpc.RpcError, target: str, *, tls: bool) -> Error:
    """Turn what grpcio raises into an error of this package."""
    if not isinstance(failure, grpc.Call):
        return Error(str(failure), code="UNKNOWN")
    code = failure.code()
    message = failure.details() or "the daemon gave no message"
    info = _error_info(failure)
    if info is None and code is grpc.StatusCode.UNAVAILABLE:
        return ConnectError(_unreachable(target, message, tls=tls), code=code.name)
    if info is None and code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"no answer from {target} in time: {message}", code=code.name)
    if info is None and code is grpc.StatusCode.UNIMPLEMENTED:
        # A daemon gives a reason even for calls that it does not know.
        message = f"what listens at {target} speaks gRPC and does not know this call: is it another service?"
    if info is None:
        return _CLASSES.get(code, Error)(message, code=code.name)
    details = MappingProxyType(dict(info.metadata))
    return _CLASSES.get(code, Error)(message, code=code.name, reason=info.reason, details=details)


def _error_info(failure: grpc.Call) -> ErrorInfo | None:
    for key, value in failure.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        info = ErrorInfo()
        try:
            if any(detail.Unpack(info) for detail in Status.FromString(value).details):
                return info
        except DecodeError:
            return None
    return None


def _unreachable(target: str, cause: str, *, tls: bool) -> str:
    if tls:
        hint = "Is the daemon started with --tls-cert, --tls-key and --client-ca, and do the certificates fit?"
    elif "refused" in cause or "No such file" in cause:
        hint = "Start it: cargo run --release -- demo (on a Unix socket: pagewalkd serve --uds PATH)"
    else:
        hint = "Does it serve this address, without TLS? Start it: cargo run --release -- demo"
    return f"cannot reach a pagewalk daemon at {target}: {cause}. {hint}"
