"""What do the runs say? `summary` makes rows of records; the other modules show them.

In the order of their imports:

* `summary`: records to rows; `wording`: numbers and names as text;
* `bands` and `lines`: curves of several runs, and results along an option;
* `axes`, `drawing` and `figures`: the figures;
* `progress` and `terminal`: the terminal during a study, and after it;
* `csv_files` and `page`: the files.
"""
