"""kvtier's errors as gRPC statuses: the one place where they are mapped."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from kvtier.errors import InvalidRequest, KvtierError


class ErrorStatus(aio.ServerInterceptor):
    """Ends a call that raised a KvtierError with that error's status and message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.stream_stream:
            return handler  # reflection's, which raises none of ours
        # The bytes are decoded in here, so that malformed ones are an error like any other.
        decode, encode = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            answer = _answering(handler.unary_unary, partial(_decoded, decode))
            return grpc.unary_unary_rpc_method_handler(answer, None, encode)
        if handler.stream_unary:
            answer = _answering(handler.stream_unary, partial(_each_decoded, decode))
            return grpc.stream_unary_rpc_method_handler(answer, None, encode)
        stream = _streaming(handler.unary_stream, partial(_decoded, decode))
        return grpc.unary_stream_rpc_method_handler(stream, None, encode)


def _decoded(decode: Callable[[bytes], Any], sent: bytes) -> Any:
    try:
        return decode(sent)
    except DecodeError:
        raise InvalidRequest(f"message: its {len(sent)} bytes are not of the protocol") from None


async def _each_decoded(
    decode: Callable[[bytes], Any], sent: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for message in sent:
        yield _decoded(decode, message)


def _answering(behaviour: Any, decoded: Callable[[Any], Any]) -> Any:
    async def answer(sent: Any, context: "aio.ServicerContext[Any, Any]") -> Any:
        try:
            return await behaviour(decoded(sent), context)
        except KvtierError as error:
            await _abort(context, error)

    return answer


def _streaming(behaviour: Any, decoded: Callable[[Any], Any]) -> Any:
    async def stream(sent: Any, context: "aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
        try:
            async for message in behaviour(decoded(sent), context):
                yield message
        except KvtierError as error:
            await _abort(context, error)

    return stream


async def _abort(context: "aio.ServicerContext[Any, Any]", error: KvtierError) -> None:
    await context.abort(grpc.StatusCode[error.status], str(error))
