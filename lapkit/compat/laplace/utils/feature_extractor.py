"""The reference's names of ways from many features to one; what counts is what the network does."""

from lapkit.compat.laplace.utils.enums import Option


class FeatureReduction(Option):
    """How a network goes from a sequence of features to one."""

    PICK_FIRST = "pick_first"
    PICK_LAST = "pick_last"
    AVERAGE = "average"
