"""A rule of your own, on routing that hypothesis draws and shrinks.    python examples/property.py"""

from hypothesis import given, settings

from deepep.sim.cases.strategies import cases
from deepep.sim.rules import oracle


@settings(max_examples=50, deadline=None)
@given(cases())
def nobody_receives_more_rows_than_there_are_tokens(case):
    views = oracle.observe(case)  # what every rank gets, by the reference's global view
    for rank in case.dispatch_members:  # the ranks that are not masked
        if case.options.mode == "ht":
            assert len(views[rank].recv_x) <= sum(case.num_tokens)


nobody_receives_more_rows_than_there_are_tokens()
print("holds for 50 drawn cases")
