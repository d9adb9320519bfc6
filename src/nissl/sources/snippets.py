"""The coding tasks of `nissl.sources.tasks`, each solved in C++ and in Python: a contrast between two languages."""

from __future__ import annotations

from nissl.sources.tasks import CODING_TASKS, CODING_TEMPLATES

SNIPPETS: dict[str, tuple[str, str]] = {
    "sorts a list of numbers": (
        "#include <algorithm>\n#include <vector>\nvoid sort(std::vector<int>& v) { std::sort(v.begin(), v.end()); }",
        "def sort(v):\n    return sorted(v)",
    ),
    "reverses a string": (
        "#include <string>\nstd::string reverse(const std::string& s) { return std::string(s.rbegin(), s.rend()); }",
        "def reverse(s):\n    return s[::-1]",
    ),
    "counts the words in a text": (
        "#include <sstream>\n#include <string>\nint count(const std::string& text) {\n    std::istringstream in(text);\n    std::string w;\n"
        "    int n = 0;\n    while (in >> w) n++;\n    return n;\n}",
        "def count(text):\n    return len(text.split())",
    ),
    "computes the factorial of a number": (
        "long factorial(int n) {\n    return n < 2 ? 1 : n * factorial(n - 1);\n}",
        "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)",
    ),
    "finds the largest element of a list": (
        "#include <algorithm>\n#include <vector>\nint largest(const std::vector<int>& v) {\n"
        "    return *std::max_element(v.begin(), v.end());\n}",
        "def largest(v):\n    return max(v)",
    ),
    "checks whether a number is prime": (
        "bool is_prime(int n) {\n    if (n < 2) return false;\n    for (int d = 2; d * d <= n; d++)\n"
        "        if (n % d == 0) return false;\n    return true;\n}",
        "def is_prime(n):\n    if n < 2:\n        return False\n    return all(n % d for d in range(2, int(n ** 0.5) + 1))",
    ),
    "merges two sorted lists": (
        "#include <algorithm>\n#include <vector>\nstd::vector<int> merge(const std::vector<int>& a, const std::vector<int>& b) {\n"
        "    std::vector<int> out(a.size() + b.size());\n"
        "    std::merge(a.begin(), a.end(), b.begin(), b.end(), out.begin());\n    return out;\n}",
        "import heapq\n\ndef merge(a, b):\n    return list(heapq.merge(a, b))",
    ),
    "computes the n-th Fibonacci number": (
        "long fibonacci(int n) {\n    long a = 0, b = 1;\n    while (n-- > 0) { long t = a + b; a = b; b = t; }\n"
        "    return a;\n}",
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    ),
    "removes duplicates from a list": (
        "#include <set>\n#include <vector>\nstd::vector<int> unique(const std::vector<int>& v) {\n"
        "    std::set<int> s(v.begin(), v.end());\n    return std::vector<int>(s.begin(), s.end());\n}",
        "def unique(v):\n    return list(dict.fromkeys(v))",
    ),
    "checks whether a word is a palindrome": (
        "#include <string>\nbool palindrome(const std::string& w) {\n    return w == std::string(w.rbegin(), w.rend());\n}",
        "def palindrome(w):\n    return w == w[::-1]",
    ),
    "finds the greatest common divisor of two numbers": (
        "int gcd(int a, int b) {\n    return b == 0 ? a : gcd(b, a % b);\n}",
        "def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)",
    ),
    "counts the vowels in a string": (
        '#include <string>\nint vowels(const std::string& s) {\n    int n = 0;\n    for (char c : s)\n'
        '        if (std::string("aeiou").find(c) != std::string::npos) n++;\n    return n;\n}',
        'def vowels(s):\n    return sum(c in "aeiou" for c in s)',
    ),
    "transposes a matrix": (
        "#include <vector>\nusing Matrix = std::vector<std::vector<double>>;\nMatrix transpose(const Matrix& m) {\n"
        "    Matrix t(m[0].size(), std::vector<double>(m.size()));\n    for (std::size_t i = 0; i < m.size(); i++)\n"
        "        for (std::size_t j = 0; j < m[0].size(); j++) t[j][i] = m[i][j];\n    return t;\n}",
        "def transpose(m):\n    return [list(row) for row in zip(*m)]",
    ),
    "multiplies two matrices": (
        "#include <vector>\nusing Matrix = std::vector<std::vector<double>>;\n"
        "Matrix multiply(const Matrix& a, const Matrix& b) {\n"
        "    Matrix c(a.size(), std::vector<double>(b[0].size(), 0.0));\n    for (std::size_t i = 0; i < a.size(); i++)\n"
        "        for (std::size_t j = 0; j < b[0].size(); j++)\n"
        "            for (std::size_t k = 0; k < b.size(); k++) c[i][j] += a[i][k] * b[k][j];\n    return c;\n}",
        "def multiply(a, b):\n    return [[sum(x * y for x, y in zip(row, col)) for col in zip(*b)] for row in a]",
    ),
    "searches a sorted list by bisection": (
        "#include <vector>\nint search(const std::vector<int>& v, int x) {\n    int lo = 0, hi = v.size() - 1;\n"
        "    while (lo <= hi) {\n        int mid = (lo + hi) / 2;\n        if (v[mid] == x) return mid;\n"
        "        if (v[mid] < x) lo = mid + 1; else hi = mid - 1;\n    }\n    return -1;\n}",
        "def search(v, x):\n    lo, hi = 0, len(v) - 1\n    while lo <= hi:\n        mid = (lo + hi) // 2\n"
        "        if v[mid] == x:\n            return mid\n        if v[mid] < x:\n            lo = mid + 1\n"
        "        else:\n            hi = mid - 1\n    return -1",
    ),
    "reads a file and prints its lines": (
        "#include <fstream>\n#include <iostream>\n#include <string>\nvoid show(const std::string& path) {\n"
        "    std::ifstream in(path);\n    std::string line;\n"
        "    while (std::getline(in, line)) std::cout << line << std::endl;\n}",
        "def show(path):\n    with open(path) as f:\n        for line in f:\n            print(line.rstrip())",
    ),
    "converts Celsius to Fahrenheit": (
        "double fahrenheit(double celsius) {\n    return celsius * 9.0 / 5.0 + 32.0;\n}",
        "def fahrenheit(celsius):\n    return celsius * 9 / 5 + 32",
    ),
    "sums the digits of a number": (
        "int digits(int n) {\n    int sum = 0;\n    while (n > 0) { sum += n % 10; n /= 10; }\n    return sum;\n}",
        "def digits(n):\n    return sum(int(c) for c in str(n))",
    ),
    "builds a binary search tree": (
        "struct Node {\n    int key;\n    Node* left = nullptr;\n    Node* right = nullptr;\n};\n"
        "Node* insert(Node* root, int key) {\n    if (!root) return new Node{key};\n"
        "    if (key < root->key) root->left = insert(root->left, key);\n"
        "    else root->right = insert(root->right, key);\n    return root;\n}",
        "class Node:\n    def __init__(self, key):\n        self.key, self.left, self.right = key, None, None\n\n"
        "def insert(root, key):\n    if root is None:\n        return Node(key)\n    if key < root.key:\n"
        "        root.left = insert(root.left, key)\n    else:\n        root.right = insert(root.right, key)\n"
        "    return root",
    ),
    "traverses a graph breadth first": (
        "#include <queue>\n#include <vector>\nvoid traverse(const std::vector<std::vector<int>>& graph, int start) {\n"
        "    std::vector<bool> seen(graph.size());\n    std::queue<int> q;\n    q.push(start);\n    seen[start] = true;\n"
        "    while (!q.empty()) {\n        int u = q.front(); q.pop();\n"
        "        for (int v : graph[u]) if (!seen[v]) { seen[v] = true; q.push(v); }\n    }\n}",
        "from collections import deque\n\ndef traverse(graph, start):\n    seen, queue = {start}, deque([start])\n"
        "    while queue:\n        u = queue.popleft()\n        for v in graph[u]:\n            if v not in seen:\n"
        "                seen.add(v)\n                queue.append(v)\n    return seen",
    ),
    "computes the mean and variance of a list": (
        "#include <vector>\nvoid moments(const std::vector<double>& v, double& mean, double& var) {\n"
        "    mean = var = 0;\n    for (double x : v) mean += x / v.size();\n"
        "    for (double x : v) var += (x - mean) * (x - mean) / v.size();\n}",
        "def moments(v):\n    mean = sum(v) / len(v)\n    return mean, sum((x - mean) ** 2 for x in v) / len(v)",
    ),
    "parses a date": (
        '#include <cstdio>\nbool parse(const char* text, int& y, int& m, int& d) {\n'
        '    return std::sscanf(text, "%d-%d-%d", &y, &m, &d) == 3;\n}',
        'from datetime import datetime\n\ndef parse(text):\n    return datetime.strptime(text, "%Y-%m-%d")',
    ),
    "generates all permutations of a list": (
        "#include <algorithm>\n#include <vector>\nstd::vector<std::vector<int>> permutations(std::vector<int> v) {\n"
        "    std::vector<std::vector<int>> out;\n    std::sort(v.begin(), v.end());\n"
        "    do out.push_back(v); while (std::next_permutation(v.begin(), v.end()));\n    return out;\n}",
        "from itertools import permutations\n\ndef all_permutations(v):\n    return list(permutations(v))",
    ),
    "solves a quadratic equation": (
        "#include <cmath>\n#include <utility>\nstd::pair<double, double> solve(double a, double b, double c) {\n"
        "    double root = std::sqrt(b * b - 4 * a * c);\n    return {(-b - root) / (2 * a), (-b + root) / (2 * a)};\n}",
        "import math\n\ndef solve(a, b, c):\n    root = math.sqrt(b * b - 4 * a * c)\n"
        "    return (-b - root) / (2 * a), (-b + root) / (2 * a)",
    ),
    "simulates a queue with two stacks": (
        "#include <stack>\nclass Queue {\n    std::stack<int> in, out;\npublic:\n    void push(int x) { in.push(x); }\n"
        "    int pop() {\n        if (out.empty()) while (!in.empty()) { out.push(in.top()); in.pop(); }\n"
        "        int x = out.top(); out.pop();\n        return x;\n    }\n};",
        "class Queue:\n    def __init__(self):\n        self.inside, self.outside = [], []\n\n"
        "    def push(self, x):\n        self.inside.append(x)\n\n    def pop(self):\n        if not self.outside:\n"
        "            while self.inside:\n                self.outside.append(self.inside.pop())\n"
        "        return self.outside.pop()",
    ),
    "finds the shortest path in a graph": (
        "#include <queue>\n#include <vector>\nint shortest(const std::vector<std::vector<int>>& g, int a, int b) {\n"
        "    std::vector<int> dist(g.size(), -1);\n    std::queue<int> q;\n    q.push(a);\n    dist[a] = 0;\n"
        "    while (!q.empty()) {\n        int u = q.front(); q.pop();\n"
        "        for (int v : g[u]) if (dist[v] < 0) { dist[v] = dist[u] + 1; q.push(v); }\n    }\n"
        "    return dist[b];\n}",
        "from collections import deque\n\ndef shortest(g, a, b):\n    dist, queue = {a: 0}, deque([a])\n"
        "    while queue:\n        u = queue.popleft()\n        for v in g[u]:\n            if v not in dist:\n"
        "                dist[v] = dist[u] + 1\n                queue.append(v)\n    return dist.get(b)",
    ),
    "validates an email address": (
        '#include <regex>\n#include <string>\nbool valid(const std::string& s) {\n'
        '    return std::regex_match(s, std::regex("[\\\\w.]+@[\\\\w.]+\\\\.[a-z]+"));\n}',
        'import re\n\ndef valid(s):\n    return re.fullmatch(r"[\\w.]+@[\\w.]+\\.[a-z]+", s) is not None',
    ),
    "draws a random sample from a list": (
        "#include <algorithm>\n#include <iterator>\n#include <random>\n#include <vector>\n"
        "std::vector<int> sample(const std::vector<int>& v, int k) {\n    std::vector<int> out;\n"
        "    std::sample(v.begin(), v.end(), std::back_inserter(out), k, std::mt19937{});\n    return out;\n}",
        "import random\n\ndef sample(v, k):\n    return random.sample(v, k)",
    ),
    "writes a table to a file": (
        "#include <fstream>\n#include <string>\n#include <vector>\n"
        "void write(const std::string& path, const std::vector<std::vector<double>>& table) {\n"
        "    std::ofstream out(path);\n    for (const auto& row : table) {\n"
        "        for (double x : row) out << x << ',';\n        out << std::endl;\n    }\n}",
        'import csv\n\ndef write(path, table):\n    with open(path, "w", newline="") as f:\n'
        "        csv.writer(f).writerows(table)",
    ),
    "computes the distance between two points": (
        "#include <cmath>\ndouble distance(double x1, double y1, double x2, double y2) {\n"
        "    return std::hypot(x2 - x1, y2 - y1);\n}",
        "import math\n\ndef distance(p, q):\n    return math.dist(p, q)",
    ),
    "counts how often each letter occurs": (
        "#include <map>\n#include <string>\nstd::map<char, int> letters(const std::string& s) {\n"
        "    std::map<char, int> n;\n    for (char c : s) n[c]++;\n    return n;\n}",
        "from collections import Counter\n\ndef letters(s):\n    return Counter(s)",
    ),
    "converts a number to binary": (
        "#include <string>\nstd::string binary(unsigned n) {\n    std::string s;\n"
        "    do s.insert(s.begin(), '0' + n % 2); while (n /= 2);\n    return s;\n}",
        "def binary(n):\n    return bin(n)[2:]",
    ),
    "finds the longest common prefix of some words": (
        "#include <string>\n#include <vector>\nstd::string prefix(const std::vector<std::string>& words) {\n"
        "    std::string p = words[0];\n    for (const auto& w : words)\n"
        "        while (w.compare(0, p.size(), p) != 0) p.pop_back();\n    return p;\n}",
        "import os\n\ndef prefix(words):\n    return os.path.commonprefix(words)",
    ),
    "rotates a list by k places": (
        "#include <algorithm>\n#include <vector>\nvoid rotate(std::vector<int>& v, int k) {\n"
        "    std::rotate(v.begin(), v.begin() + k % v.size(), v.end());\n}",
        "def rotate(v, k):\n    k %= len(v)\n    return v[k:] + v[:k]",
    ),
    "evaluates a polynomial": (
        "#include <vector>\ndouble evaluate(const std::vector<double>& c, double x) {\n    double y = 0;\n"
        "    for (double a : c) y = y * x + a;\n    return y;\n}",
        "def evaluate(c, x):\n    y = 0\n    for a in c:\n        y = y * x + a\n    return y",
    ),
    "caches the results of a slow function": (
        "#include <map>\nstd::map<int, int> cache;\nint cached(int (*f)(int), int x) {\n"
        "    if (!cache.count(x)) cache[x] = f(x);\n    return cache[x];\n}",
        "from functools import cache\n\n@cache\ndef cached(x):\n    return slow(x)",
    ),
}  # fmt: skip
"""Task, and its solution in C++ and in Python."""


def code_answers() -> tuple[list[str], list[str], list[str]]:
    """Prompts that end in an open code fence, and for each the rest of the block in C++ and in Python.

    No prompt names a language; the four templates take turns. All answers end in the closing fence, so that their last
    token tells nothing.
    """
    prompts, cpp, python = [], [], []
    for i, task in enumerate(CODING_TASKS):
        prompts.append(f"{CODING_TEMPLATES[i % len(CODING_TEMPLATES)].format(task)}\n```")
        for answers, tag, code in zip((cpp, python), ("cpp", "python"), SNIPPETS[task], strict=True):
            answers.append(f"{tag}\n{code}\n```")
    return prompts, cpp, python
