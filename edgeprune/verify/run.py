"""Run the checks, one after the other."""

from __future__ import annotations

from edgeprune.common.errors import InputError
from edgeprune.verify import checks
from edgeprune.verify.finding import FAIL, NOT_JUDGED, Finding
from edgeprune.verify.subject import Subject


def run(subject: Subject) -> list[Finding]:
    """Return the findings of all checks. A file that cannot be read fails the check that needs it, and ends the run.

    Raises:
        InputError: the memory that was given does not suffice.
    """
    found: list[Finding] = []
    for name in checks.CHECKS:
        if broken := next((finding.check for finding in found if finding.verdict == FAIL and not finding.measure), ""):
            found.append(Finding(name, "", NOT_JUDGED, advice=f"first mend what {broken} has found"))
            continue
        if name == checks.CHECKS[1]:  # the files are whole, and nothing is computed yet
            subject.check_room()
            subject.say_time()
        try:
            found += checks.load(name)(subject)
        except InputError as error:
            found.append(Finding(name, "", FAIL, advice=str(error)))
    return found
