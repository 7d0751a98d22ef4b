"""Programming tasks put together from parts: short ones with computed tests, and long ones over libraries."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from random import Random
from typing import Any

_EXPERT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}"
)
_SHORT = (
    _EXPERT,
    _EXPERT,
    "{text}\nYour code should pass these tests:\n{tests}",
    "{text} The function is called `{name}`.",
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{text}\n{first}\n```",
    '"""\n{text}\n{first}\n"""\n',
    "{text}\n\nUse these tests:\n```python\n{tests}\n```\nReturn only the function, in a code block.",
)
_Filter = tuple[str, str, Callable[[int], bool]]
_Aggregate = tuple[str, str, Callable[[list[int]], Any]]

_FILTERS: Sequence[_Filter] = (
    ("even numbers", "even", lambda x: x % 2 == 0),
    ("odd numbers", "odd", lambda x: x % 2 == 1),
    ("positive numbers", "positive", lambda x: x > 0),
    ("negative numbers", "negative", lambda x: x < 0),
    ("numbers divisible by 3", "divisible_by_three", lambda x: x % 3 == 0),
    ("numbers greater than 10", "greater_than_ten", lambda x: x > 10),
    ("numbers less than 5", "less_than_five", lambda x: x < 5),
    ("prime numbers", "prime", lambda x: x > 1 and all(x % d for d in range(2, math.isqrt(x) + 1))),
    ("perfect squares", "square", lambda x: x >= 0 and math.isqrt(x) ** 2 == x),
    ("two digit numbers", "two_digit", lambda x: 10 <= abs(x) <= 99),
    ("numbers that end in 5", "ending_in_five", lambda x: abs(x) % 10 == 5),
    ("numbers with an even digit sum", "even_digit_sum", lambda x: sum(map(int, str(abs(x)))) % 2 == 0),
    ("palindromic numbers", "palindromic", lambda x: str(x) == str(x)[::-1]),
    ("powers of two", "power_of_two", lambda x: x > 0 and x & (x - 1) == 0),
)
_AGGREGATES: Sequence[_Aggregate] = (
    ("the sum of", "sum", sum),
    ("the product of", "product", math.prod),
    ("the number of", "count", len),
    ("the largest of", "largest", lambda xs: max(xs, default=None)),
    ("the smallest of", "smallest", lambda xs: min(xs, default=None)),
    ("the sum of the squares of", "square_sum", lambda xs: sum(x * x for x in xs)),
    ("the difference between the largest and the smallest of", "range", lambda xs: max(xs) - min(xs) if xs else 0),
    ("the median of", "median", lambda xs: statistics.median(xs) if xs else None),
    ("the running totals of", "running_totals", lambda xs: list(accumulate(xs))),
    ("a sorted list of", "sorted", sorted),
    ("a list of the distinct", "distinct", lambda xs: list(dict.fromkeys(xs))),
    ("the most frequent of", "most_frequent", lambda xs: Counter(xs).most_common(1)[0][0] if xs else None),
    ("the positions in sorted order of", "ranks", lambda xs: sorted(range(len(xs)), key=lambda i: xs[i])),
)
_STRINGS: Sequence[tuple[str, str, Callable[[str], Any]]] = (
    ("count the vowels in a given string", "count_vowels", lambda s: sum(c in "aeiouAEIOU" for c in s)),
    ("reverse the order of the words in a string", "reverse_words", lambda s: " ".join(s.split()[::-1])),
    ("reverse each word of a string", "reverse_each_word", lambda s: " ".join(w[::-1] for w in s.split())),
    ("remove duplicate characters from a string", "remove_duplicates", lambda s: "".join(dict.fromkeys(s))),
    ("find the longest word in a sentence", "longest_word", lambda s: max(s.split(), key=len)),
    ("find the length of the shortest word", "shortest_length", lambda s: min(map(len, s.split()))),
    ("capitalise the first and last letter of each word", "capitalize_ends", lambda s: _ends(s)),
    ("sort the words of a string by their lengths", "sort_words", lambda s: sorted(s.split(), key=len)),
    ("replace all spaces with underscores", "snake", lambda s: s.replace(" ", "_")),
    ("convert a sentence to camel case", "to_camel", lambda s: "".join(w.capitalize() for w in s.split())),
    ("count how often each character occurs in a string", "char_counts", lambda s: dict(Counter(s))),
    ("remove all vowels from a string", "remove_vowels", lambda s: "".join(c for c in s if c not in "aeiouAEIOU")),
    ("find the first character that occurs twice", "first_repeat", lambda s: _repeat(s)),
    ("check whether a string reads the same backwards", "is_palindrome", lambda s: s == s[::-1]),
    ("make an acronym of a phrase", "acronym", lambda s: "".join(w[0].upper() for w in s.split())),
    ("swap the case of every letter", "swap_case", str.swapcase),
    ("list the words with more than four letters", "long_words", lambda s: [w for w in s.split() if len(w) > 4]),
    ("count the words in a string", "count_words", lambda s: len(s.split())),
    ("delete every second character of a string", "every_other", lambda s: s[::2]),
    ("run-length encode a string", "encode", lambda s: _runs(s)),
)
_THEN: Sequence[tuple[str, str, Callable[[list[int]], list[int]]]] = (
    ("reverse the list", "reverse", lambda xs: xs[::-1]),
    ("sort it in descending order", "sort_descending", lambda xs: sorted(xs, reverse=True)),
    ("remove the duplicates", "dedupe", lambda xs: list(dict.fromkeys(xs))),
    ("rotate it to the left by two", "rotate_left", lambda xs: xs[2:] + xs[:2]),
    ("rotate it to the right by one", "rotate_right", lambda xs: xs[-1:] + xs[:-1]),
    ("square each element", "square", lambda xs: [x * x for x in xs]),
    ("replace each element by its absolute value", "absolute", lambda xs: [abs(x) for x in xs]),
    ("add its index to each element", "add_index", lambda xs: [x + i for i, x in enumerate(xs)]),
    ("keep every second element", "every_second", lambda xs: xs[::2]),
    ("remove the first and the last element", "trim_ends", lambda xs: xs[1:-1]),
    ("swap the first and the last element", "swap_ends", lambda xs: [xs[-1], *xs[1:-1], xs[0]] if len(xs) > 1 else xs),
    (
        "compute the differences of neighbours",
        "differences",
        lambda xs: [b - a for a, b in pairwise(xs)],
    ),
    ("move all zeros to the end", "move_zeros", lambda xs: [x for x in xs if x] + [x for x in xs if not x]),
    ("double the even elements", "double_even", lambda xs: [2 * x if x % 2 == 0 else x for x in xs]),
    ("sort by the last digit", "sort_last_digit", lambda xs: sorted(xs, key=lambda x: abs(x) % 10)),
    ("compute the running maximum", "running_max", lambda xs: list(accumulate(xs, max))),
)
_WORDS = [
    *("river", "stone", "window", "garden", "python", "level", "the", "quick", "brown", "fox", "data", "model"),
    *("noon", "Table", "radar", "engine", "yellow", "kite", "apple", "little", "summer", "coding", "test", "value"),
    *("racecar", "Number", "of", "blue", "moon", "hello", "world", "Order", "abba", "book", "letter", "is", "a"),
]


def _ends(text: str) -> str:
    return " ".join(w[0].upper() + w[1:-1] + w[-1].upper() if len(w) > 1 else w.upper() for w in text.split())


def _repeat(text: str) -> str | None:
    return next((c for i, c in enumerate(text) if c in text[:i]), None)


def _runs(text: str) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for c in text:
        runs[-1:] = [(c, runs[-1][1] + 1)] if runs and runs[-1][0] == c else [*runs[-1:], (c, 1)]
    return runs


def short_task(random: Random) -> str:
    """A prompt in the style of MBPP: one sentence, and assertions whose results are computed here."""
    kind = random.random()
    if kind < 0.3:
        phrase, name, text_function = random.choice(_STRINGS)
        words = [" ".join(random.sample(_WORDS, random.randint(1, 5))) for _ in range(3)]
        cases = [(repr(each), text_function(each)) for each in words]
    elif kind < 0.6:
        chosen = random.sample(_THEN, random.choice((1, 2, 2, 2, 3)))
        phrase = "take a list of integers, " + ", then ".join(each[0] for each in chosen)
        name = "_then_".join(each[1] for each in chosen[:2])
        cases = []
        for given in _lists(random):
            result = given
            for step in chosen:
                result = step[2](result)
            cases.append((str(given), result))
    else:
        phrase, name, cases = _filtered(random)
    verb = random.choice(("Write a function to {}.", "Write a python function to {}.", "Write a function that can {}."))
    tests = [f"assert {name}({given}) == {result!r}" for given, result in cases]
    text = verb.format(phrase)
    return random.choice(_SHORT).format(text=text, tests="\n".join(tests), first=tests[0], name=name)


def _filtered(random: Random) -> tuple[str, str, list[tuple[str, Any]]]:
    (what, what_name, keep), (how, how_name, combine) = random.choice(_FILTERS), random.choice(_AGGREGATES)
    container = random.choice(
        ("list", "tuple", "list of lists", "dictionary's values", "list of pairs' second elements")
    )
    cases = []
    for given in _lists(random):
        result = combine([x for x in given if keep(x)])
        shown: Any = given
        if container == "tuple":
            shown = tuple(given)
        elif container == "list of lists":
            shown = [given[:2], given[2:3], given[3:]]
        elif container.startswith("dictionary"):
            shown = dict(zip("abcdefghij", given, strict=False))
        elif container.startswith("list of pairs"):
            shown = [(random.choice(_WORDS), x) for x in given]
        cases.append((str(shown), result))
    return f"find {how} all {what} in a given {container}", f"{how_name}_{what_name}", cases


def _lists(random: Random) -> list[list[int]]:
    highest = random.choice((9, 30, 120))
    return [[random.randint(-highest // 3, highest) for _ in range(random.randint(4, 9))] for _ in range(3)]


# import statements by the names that the tables below use; any other name NAME is "import NAME"
_IMPORTS = {
    "KMeans": "from sklearn.cluster import KMeans",
    "LinearRegression": "from sklearn.linear_model import LinearRegression",
    "MinMaxScaler": "from sklearn.preprocessing import MinMaxScaler",
    "PCA": "from sklearn.decomposition import PCA",
    "StandardScaler": "from sklearn.preprocessing import StandardScaler",
    "counter": "from collections import Counter",
    "datetime": "from datetime import datetime",
    "defaultdict": "from collections import defaultdict",
    "fft": "from scipy import fft",
    "itemgetter": "from operator import itemgetter",
    "np": "import numpy as np",
    "pathlib": "from pathlib import Path",
    "pd": "import pandas as pd",
    "plt": "import matplotlib.pyplot as plt",
    "sns": "import seaborn as sns",
    "stats": "from scipy import stats",
    "timedelta": "from datetime import datetime, timedelta",
    "timezone": "from datetime import datetime, timezone",
    "train_test_split": "from sklearn.model_selection import train_test_split",
    "urllib": "import urllib.request",
    "xml": "import xml.etree.ElementTree as ET",
}
# sources: the sentence, the parameters, the imports by the names in _IMPORTS
_SOURCES = (
    ("Read the CSV file at `file_path` into a DataFrame", "file_path", "pd"),
    ("Read a JSON file that holds a list of records", "json_path", "json pd"),
    ("Take a list of dictionaries and turn it into a DataFrame", "records", "pd"),
    ("Generate an array of normally distributed random numbers", "mu, sigma, size=1000", "np"),
    ("Create a DataFrame with random integers in the given columns", "columns, n_rows=100, seed=42", "np pd"),
    ("Take a list of tuples of a category and a value", "data", "defaultdict"),
    ("Read all text files in a directory", "directory", "glob os"),
    ("Take a string of text", "text", "re counter"),
    ("Query the rows of a table in an SQLite database", "db_path, table_name", "sqlite3 pd"),
    ("Take a URL and fetch its JSON content with urllib", "url, timeout=10", "json urllib"),
    ("Generate a list of random dates between two dates", "start_date, end_date, n=50, seed=None", "random timedelta"),
    ("Take two lists of numbers of equal length", "x_values, y_values", "np"),
    ("Parse a log file with lines of the form 'LEVEL timestamp message'", "log_path", "re datetime"),
    ("Generate a random walk with the given number of steps", "n_steps, seed=None", "np"),
    ("Take a nested dictionary", "data", "json"),
    ("Take an XML string of items with attributes", "xml_string", "xml"),
    ("Take a list of file paths", "paths", "os pathlib"),
    ("Run a shell command and read its output", "command", "subprocess"),
    ("Take a dictionary that maps names to lists of scores", "scores", "statistics"),
    ("Create a sine wave of the given frequency and duration", "frequency, duration, sample_rate=1000", "np math"),
)
# steps: the sentence and its imports
_STEPS = (
    ("drop what is missing or not a number", ""),
    (
        "standardise the numeric values to zero mean and unit variance",
        "StandardScaler",
    ),
    ("scale the values to the range from 0 to 1", "MinMaxScaler"),
    ("group by category and compute the mean of each group", ""),
    ("count how often each value occurs", "counter"),
    ("compute the mean, the median and the standard deviation", "statistics"),
    ("fit a linear regression to it", "LinearRegression"),
    ("cluster it into three groups with k-means and a fixed random state", "KMeans"),
    ("reduce it to two dimensions with PCA", "PCA"),
    ("remove outliers that are more than three standard deviations from the mean", "np"),
    ("compute the correlation matrix", "pd"),
    ("compute a moving average over a window of five", "np"),
    ("sort the result in descending order and keep the first ten", "heapq"),
    ("hash each item with SHA-256", "hashlib"),
    ("encode the result as base64", "base64"),
    ("remove punctuation and stop words, in lower case", "string"),
    ("split it into training and test sets", "train_test_split"),
    ("run a one-sample t-test against zero", "stats"),
    ("convert the timestamps to the given time zone", "timezone"),
    ("compute the Fourier transform and find the dominant frequency", "fft"),
    ("flatten nested parts into keys joined by dots", ""),
    ("add random noise from a seeded generator", "random"),
    ("replace every match of a regular expression", "re"),
    ("compress the result with gzip", "gzip"),
)
# outputs: the sentence, what is returned, the imports by the names in _IMPORTS
_OUTPUTS = (
    ("draw a histogram of the result", "matplotlib.axes.Axes: The axes of the histogram.", "plt"),
    ("show the result in a bar chart with labelled axes", "Axes: The axes object of the bar chart.", "plt"),
    ("plot it as a scatter plot coloured by group", "tuple: The DataFrame and the matplotlib Axes.", "plt"),
    ("draw a heatmap", "matplotlib.axes.Axes: The axes of the heatmap.", "sns plt"),
    ("draw a line plot with a grid and a title", "tuple: The array and the Axes object.", "np plt"),
    ("return the result as a dictionary", "dict: A dictionary with the results.", ""),
    ("return a DataFrame with named columns", "pd.DataFrame: The result.", "pd"),
    ("write it to a CSV file and return the path", "str: The path of the file that was written.", "csv os"),
    ("write it to a JSON file", "str: The path to the JSON file.", "json os"),
    ("return a sorted list of tuples", "list: A list of tuples, sorted by value in descending order.", "itemgetter"),
    ("save it in a new folder and make a zip archive of it", "str: The path of the zip archive.", "os shutil"),
    ("return the result with its number of elements", "tuple: The result and its number of elements.", ""),
)
_RAISES = (
    "ValueError: If the input is empty.",
    "FileNotFoundError: If the file does not exist.",
    "TypeError: If the input is not of the expected type.",
    "ValueError: If a required column is missing.",
    "Exception: If the operation fails, with the original message.",
)
_EXTRA = (
    " Use the constants below.",
    " The title is 'Result' and the axes are labelled 'Value' and 'Count'.",
    " Keys whose value is None are left out.",
    " An empty input gives an empty result.",
    " The results must be reproducible with the seed.",
)
_CONSTANTS = (
    "COLUMNS = ['A', 'B', 'C', 'D']",
    "CATEGORIES = ['x', 'y', 'z']",
    "OUTPUT_DIR = './output'",
    "THRESHOLD = 0.5",
)


def library_task(random: Random) -> str:
    """A prompt in the style of BigCodeBench: a description over libraries, its output, and the code to begin with."""
    source, parameters, source_imports = random.choice(_SOURCES)
    output, returned, output_imports = random.choice(_OUTPUTS)
    steps = random.sample(_STEPS, random.choice((1, 1, 2, 2, 3)))
    joined = ", ".join(each[0] for each in steps)
    extra = random.choice(_EXTRA) if random.random() < 0.4 else ""
    text = f"{source}, {joined}, and {output}.{extra}"
    if random.random() < 0.4:
        text += f"\nThe function should raise the exception for: {random.choice(_RAISES)}"
    text += f"\nThe function should output with:\n    {returned}"
    used = " ".join([source_imports, *(each[1] for each in steps), output_imports]).split()
    imports = [_IMPORTS.get(name, f"import {name}") for name in dict.fromkeys(used)]
    if "constants" in extra:
        imports += ["# Constants", random.choice(_CONSTANTS)]
    if "write it" in output or "save it" in output:
        parameters += ", output_path" if "=" not in parameters else ", output_path=None"
    start = "\n".join([*imports, f"def task_func({parameters}):"])
    opening = "" if random.random() < 0.7 else random.choice(("Implement the following. ", "Write a Python function. "))
    return f"{opening}{text}\nYou should write self-contained code starting with:\n```\n{start}\n```"
