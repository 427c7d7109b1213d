"""The parts that `lapkit.Laplace` is made of: fitting, posterior, tuning, functions, predictions, storage."""
