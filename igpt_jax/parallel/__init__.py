"""The mesh and its sharding rules, accelerators and their topologies, checksums of sharded arrays."""
