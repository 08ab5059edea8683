"""A seeded, single-threaded world for the real `decide`, hands, driver step, store and charges.

    python -m tests.simulation --schedules 100000 --seed 1

`plan` makes a schedule of faults from a seed, `cloud` is a provider that lags, lies and loses answers, `nodes` a site whose
machines train in virtual time, `engine` runs one schedule with crashes at commits and calls, `rules` holds the invariants,
`campaign` runs many and shrinks what fails.
"""
