"""Entries of a rank table's JSON, each with its place, for errors; and what they amount to. Torch-free."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from octofold.backends.errors import UserError

REMEDY = "mend the file, or have it written anew (octofold rank-table, or the cluster's Ascend Operator)"


@dataclass(frozen=True)
class Entry:
    """A value of the table."""

    place: str
    """Such as `hccl.json: server_list[0].device[1].rank_id`."""
    value: Any

    def error(self, rule: str, remedy: str = REMEDY) -> UserError:
        """An error that names this entry and shows its value, shortened."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else f"{shown[:76]} ..."
        return UserError(f"{self.place} = {shown}\n  rule:   {rule}\n  remedy: {remedy}")

    def find(self, key: str) -> "Entry | None":
        """The entry of that key, if there is one.

        Raises:
            UserError: this is no object.
        """
        if not isinstance(self.value, dict):
            raise self.error("a JSON object")
        separator = "" if self.place.endswith(": ") else "."
        return Entry(f"{self.place}{separator}{key}", self.value[key]) if key in self.value else None

    def get(self, key: str) -> "Entry":
        """The entry of that key, which must be there."""
        found = self.find(key)
        if found is None:
            raise self.error(f"has the key {key}")
        return found

    def each(self, key: str) -> list["Entry"]:
        """The entries of the list of that key, of which there is at least one."""
        entry = self.get(key)
        if not isinstance(entry.value, list) or not entry.value:
            raise entry.error("a list that is not empty")
        return [Entry(f"{entry.place}[{index}]", value) for index, value in enumerate(entry.value)]

    def text(self, longest: int) -> str:
        """This entry as a text of at least one character."""
        if not isinstance(self.value, str) or not 0 < len(self.value) <= longest:
            raise self.error(f"a text of 1 to {longest} characters")
        return self.value

    def number(self, least: int, most: int) -> int:
        """This entry as a whole number, which rank tables also write as a text."""
        is_number = isinstance(self.value, int) and not isinstance(self.value, bool)
        if not is_number and not (isinstance(self.value, str) and re.fullmatch(r"\d{1,18}", self.value)):
            raise self.error("a whole number")
        number = int(self.value)
        if not least <= number <= most:
            raise self.error(f"a whole number from {least} to {most}")
        return number

    def address(self) -> str:
        """This entry as an IPv4 or IPv6 address."""
        try:
            return str(ipaddress.ip_address(self.value if isinstance(self.value, str) else ""))
        except ValueError as error:
            raise self.error("an IPv4 or IPv6 address") from error


class Once:
    """Values that no two entries share."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.places: dict[object, str] = {}

    def add(self, entry: Entry, value: object) -> None:
        """Note the value of an entry.

        Raises:
            UserError: an earlier entry has it.
        """
        if value in self.places:
            raise entry.error(f"{self.what} is unique, and {self.places[value]} has it, too")
        self.places[value] = entry.place


def require_whole(ranks: list[Entry], numbers: list[int]) -> None:
    """Refuse ranks that are not 0 to N - 1.

    Args:
        ranks: the entries.
        numbers: what they say, all different.
    """
    for entry, number in zip(ranks, numbers, strict=True):
        if number >= len(numbers):
            raise entry.error(f"ranks are 0 to {len(numbers) - 1}, one for each of the {len(numbers)} devices")


@dataclass(frozen=True)
class Device:
    """A rank's device."""

    rank: int
    device_id: int
    """Physical, on its server (/dev/davinciN)."""
    address: str | None = None
    """Of its own network card; None where it has or needs none. 2.0: the first of net_layer 0."""


@dataclass(frozen=True)
class Server:
    """A server and its devices, in the order of their ranks."""

    name: str
    devices: tuple[Device, ...]
    super_pod: str | None = None
