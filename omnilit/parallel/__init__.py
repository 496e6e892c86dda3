"""Pure torch.distributed: meshes, sharding, norms, agreements between ranks."""
