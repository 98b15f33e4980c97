"""The Open Inference Protocol over gRPC, on a port of its own and on the same event loop as HTTP (extra `grpc`)."""
