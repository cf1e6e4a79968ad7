"""Print the failed tests of a JUnit report: their names, the ends of what they said."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

report = Path(sys.argv[1])
if not report.exists():
    sys.exit(f"No test ran: there is no {report}.")
for case in ET.parse(report).iter("testcase"):
    for failure in (*case.findall("failure"), *case.findall("error")):
        print(f"== FAILED {case.get('classname')}::{case.get('name')}\n{(failure.text or '')[-3000:]}")
