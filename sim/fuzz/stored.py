"""Failing examples as files: small, readable, and the same bits wherever they are replayed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from deepep.sim.cases.case import Case
from deepep.sim.cases.files import CaseError, Fields, read_json
from deepep.sim.fuzz.fuzzer import Finding

FORMAT = "deepep.failing-example"
VERSION = 1
#: Most cases of a file.
MAX_CASES = 4096


@dataclass(frozen=True)
class StoredExample:
    """A stored example: the cases to run in order, and what failed when it was written."""

    subject: str
    rule: str
    message: str
    cases: tuple[Case, ...]

    @staticmethod
    def of(finding: Finding) -> StoredExample:
        return StoredExample(finding.subject, finding.rule, finding.message, finding.cases)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file (JSON)."""
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "subject": self.subject,
            "rule": self.rule,
            "message": self.message,
            "cases": [case.to_plain() for case in self.cases],
        }
        Path(path).write_text(json.dumps(plain, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> StoredExample:
        """Reads a failing example, or a file with a single case.

        Raises:
            CaseError: the file is neither, or of another version. It is a ValueError.
            OSError: it cannot be read.
        """
        plain = read_json(path)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            return StoredExample("", "", "", (Case.from_plain(plain),))
        given = Fields(plain, str(path))
        given.integer("version", VERSION, VERSION)
        cases = tuple(Case.from_plain(case) for case in given.items("cases", MAX_CASES))
        if not cases:
            raise CaseError(f"{path}: cases: got none; allowed: 1 or more")
        return StoredExample(given.text("subject"), given.text("rule"), given.text("message", 1 << 20), cases)
