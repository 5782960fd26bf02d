"""How many devices fit a job, in one line: what a plan comes to."""

from collections import Counter

from liberatai_coordinator.cli.tables import clean, count_text
from liberatai_coordinator.client.views import PlanView


def fits_line(plan: PlanView) -> str:
    """Return how many devices get something of a plan, what they get, and why the others do not."""
    given = [one for one in plan.assignments if one.structure]
    if not plan.assignments:
        return "no device is known that is approved and has said what it is: nobody could train"
    count = f"{count_text(len(given))} of {count_text(len(plan.assignments))} devices fit"
    if given:
        shares = Counter(one.structure for one in given).most_common()
        count += f" ({', '.join(f'{count_text(number)} {sid}' for sid, number in shares)})"
    left = Counter(one.why for one in plan.assignments if not one.structure).most_common()
    if not left:
        return count
    why, number = left[0]
    more = f", and {len(left) - 1} other reasons" if len(left) > 1 else ""
    return f"{count}; {count_text(number)} {'does' if number == 1 else 'do'} not: {clean(why)}{more}"


def nothing_fits(plan: PlanView) -> bool:
    """Say whether no device would get anything."""
    return not any(one.structure for one in plan.assignments)
