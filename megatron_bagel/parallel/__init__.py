"""Process groups and autograd-aware collectives: what moves between ranks, knowing no model."""
