"""The table of docs/doctor.md, from the checks themselves: `python tests/doctor_page.py` prints it."""

import re

from octofold.launch.doctor import CHECKS

PASSED_ON = {"{error}": "what is wrong, as a run would say it"}


def facts_as_words(text: str) -> str:
    """{facts} in italics."""
    return re.sub(r"{(\w+)[^}]*}", r"*\1*", PASSED_ON.get(text, text)).replace("|", "\\|")


def table() -> str:
    """A section a check, in the order of the output."""
    lines = []
    for check in CHECKS:
        lines += [f"### {check.name}", "", f"{check.about[0].upper()}{check.about[1:]}.", ""]
        lines += ["| | found | remedy |", "|---|---|---|"]
        for problem in check.problems:
            remedy = "what that error says" if problem.remedy == "{remedy}" else facts_as_words(problem.remedy)
            lines.append(f"| {problem.status} | {facts_as_words(problem.what)} | {remedy} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
