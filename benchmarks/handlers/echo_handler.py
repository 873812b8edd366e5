"""What both protocols cost by themselves: the libraries that our server stands on, giving back what they get."""

import asyncio

import grpc
import uvicorn
import uvloop


async def echo(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def mirror(request, context):
    return request


class Any(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(mirror)


async def main():
    rpc = grpc.aio.server(handlers=[Any()])
    grpc_port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    config = uvicorn.Config(echo, http="httptools", ws="none", lifespan="off", log_level="error", port=0)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(f"http:{server.servers[0].sockets[0].getsockname()[1]}", flush=True)
    print(f"grpc:{grpc_port}", flush=True)
    await serving
    await rpc.stop(0)


uvloop.run(main())
