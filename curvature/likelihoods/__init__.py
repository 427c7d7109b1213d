"""What outputs say about targets: p(y|f), its curvature in f and draws from it."""
