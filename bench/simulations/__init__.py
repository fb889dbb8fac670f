"""Do the statistics hold what they promise? Levels, coverage and floors of `omnigene_fast.analysis` in worlds of
simulated documents whose truth is known: `python -m omnigene_fast.bench.simulations`."""
