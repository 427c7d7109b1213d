"""Closed forms: what an operation's cotangent says about a weight."""
