"""The Open Inference Protocol (V2) without a wire: what REST, gRPC, V1 and TorchServe's front have in common."""
