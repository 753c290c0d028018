"""kvtier's errors as gRPC statuses: the one place where they are mapped."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc import aio

from kvtier.errors import KvtierError


class ErrorStatus(aio.ServerInterceptor):
    """Ends a call that raised a KvtierError with that error's status and message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        coders = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary), *coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_answering(handler.stream_unary), *coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream), *coders)
        return handler  # reflection's, which raises none of ours


def _answering(behaviour: Any) -> Any:
    async def answer(request: Any, context: "aio.ServicerContext[Any, Any]") -> Any:
        try:
            return await behaviour(request, context)
        except KvtierError as error:
            await _abort(context, error)

    return answer


def _streaming(behaviour: Any) -> Any:
    async def stream(request: Any, context: "aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
        try:
            async for message in behaviour(request, context):
                yield message
        except KvtierError as error:
            await _abort(context, error)

    return stream


async def _abort(context: "aio.ServicerContext[Any, Any]", error: KvtierError) -> None:
    await context.abort(grpc.StatusCode[error.status], str(error))
