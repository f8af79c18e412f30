"""RAFT, the flow network of FlowScore and WarpingError, in torch."""
