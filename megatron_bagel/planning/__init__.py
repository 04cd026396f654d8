"""What a run will need before it has a machine: memory, work, traffic and time by formula, and a rehearsal of one rank without weights."""
