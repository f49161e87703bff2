"""Reads a request: its key, its body, and whose model it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from coterie.api.jobs import GoneError, RequestError
from coterie.api.keys import Caller, Keys
from coterie.api.served import Served
from coterie.text import parse_json, plain_text, reason_of

B = TypeVar("B", bound=BaseModel)
_SHOWN = 64  # characters of a field's name that an error shows


@dataclass(frozen=True)
class Reader:
    """Reads requests for the models of ``served``."""

    served: Served
    keys: Keys

    def caller(self, request: Request) -> Caller:
        """Whose key the request has. Raises :class:`RequestError` for a missing or unknown one."""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        caller = self.keys.caller(key.strip() if scheme.lower() == "bearer" else "")
        if caller is None:
            raise RequestError("no valid API key; send it as `Authorization: Bearer KEY`", 401, "invalid_api_key")
        request.scope["coterie.caller"] = caller.name
        return caller

    def number_of(self, caller: Caller, name: str) -> int:
        """The number of the model called ``name``. One that the key may not use is as unknown as one that is not."""
        number = self.served.number_of(name)
        if number is None or not caller.may_use(name):
            raise RequestError(
                f"no model {plain_text(name, _SHOWN)!r}; /v1/models lists yours", 404, "model_not_found", "model"
            )
        return number

    async def body(self, request: Request, kind: type[B]) -> B:
        """The body of the request. Raises :class:`RequestError` that names the field that is wrong, not its value.

        Raises :class:`GoneError` for a client that hangs up before it has sent all.
        """
        sent_as = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent_as != "application/json":  # a page of another origin cannot send this without being allowed to
            raise RequestError("the Content-Type must be application/json", 415, "bad_content_type")
        try:
            raw = await request.body()
        except ClientDisconnect:
            raise GoneError from None
        try:
            return kind.model_validate(parse_json(raw))
        except ValidationError as fault:
            first = fault.errors(include_input=False, include_url=False)[0]
            where = plain_text(".".join(map(str, first["loc"])), _SHOWN)
            unknown = first["type"] == "extra_forbidden"
            what = "this service does not know it; leave it out" if unknown else first["msg"]
            raise RequestError(f"{where}: {what}" if where else what, 400, "invalid_value", where or None) from None
        except (ValueError, RecursionError) as fault:
            raise RequestError(f"the body is not JSON: {reason_of(fault)}", 400, "invalid_json") from None
