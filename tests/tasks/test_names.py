"""Names in lines of code: of definitions in many languages, and of assigned keys."""

from __future__ import annotations

import time

import pytest

from paceline.tasks.names import assigned_key, defined_name, names_of

# a line, the kind and the name of what it begins to define
DEFINITIONS = [
    # Python
    ("def load(path):", "def", "load"),
    ("    async def get(self, name: str) -> int:", "def", "get"),
    ("class Store(Base):", "class", "Store"),
    ("class Store:", "class", "Store"),
    # JavaScript and TypeScript
    ("export default class Page extends React.Component {", "class", "Page"),
    ("export async function load(path) {", "function", "load"),
    ("  async walk(node) {", "method", "walk"),
    ("  static of(value: T): Store<T> {", "method", "of"),
    ("  private readonly items(): number {", "method", "items"),
    ("  #drop(item) {", "method", "#drop"),
    ("  get size() {", "get", "size"),
    ("  set size(value) {", "set", "size"),
    ("  static get size() {", "get", "size"),
    ("const load = async (path) => {", "const", "load"),
    ("export const load = (path: string): Promise<void> => {", "const", "load"),
    ("const load = path => {", "const", "load"),
    ("const load = function (path) {", "const", "load"),
    ("const useStore = create((set) => ({", "const", "useStore"),
    ("const settings = {", "const", "settings"),
    ("interface Shape {", "interface", "Shape"),
    ("export type Shape = {", "type", "Shape"),
    ("enum Color {", "enum", "Color"),
    ("namespace Shapes {", "namespace", "Shapes"),
    ('  it("adds", () => {', "it", "adds"),
    ("  it('adds', async () => {", "it", "adds"),
    ('  test("adds two", function () {', "test", "adds two"),
    ('describe("Store", () => {', "describe", "Store"),
    ('it.only("adds", () => {', "it.only", "adds"),
    ('app.get("/users", (request, reply) => {', "app.get", "/users"),
    ("router.post('/users/:id', check, async (request, reply) => {", "router.post", "/users/:id"),
    # Go
    ("func load(path string) error {", "func", "load"),
    ("func (s *Store) Get(name string) (string, error) {", "func", "Store.Get"),
    ("func (c Cache) Get(name string) (string, error) {", "func", "Cache.Get"),
    ("func Map[T any](items []T) []T {", "func", "Map"),
    ("type Store struct {", "type", "Store"),
    ("type Reader interface {", "type", "Reader"),
    # Rust
    ("pub(crate) async fn load<T>(path: T) -> T {", "fn", "load"),
    ("impl Store {", "impl", "Store"),
    ("impl From<A> for Error {", "impl", "From<A> for Error"),
    ("impl From<B> for Error {", "impl", "From<B> for Error"),
    ("unsafe impl Send for Store {}", "impl", "Send for Store"),
    ("impl<T: Clone> Store<T> where T: Eq {", "impl", "<T: Clone> Store<T>"),
    ("pub struct Store {", "struct", "Store"),
    ("pub trait Shape {", "trait", "Shape"),
    ("mod tests {", "block", "mod tests"),
    ("macro_rules! square {", "block", "macro_rules! square"),
    ("define_id!(UserId, {", "define_id!", "UserId"),
    # Ruby and Elixir
    ("  def self.find(id)", "def", "self.find"),
    ("  def find(id)", "def", "find"),
    ("  def save!", "def", "save!"),
    ("  def empty?", "def", "empty?"),
    ("class Circle < Shape", "class", "Circle"),
    ("module Shapes", "module", "Shapes"),
    ('  it "adds" do', "it", "adds"),
    ('  context "when empty" do', "context", "when empty"),
    ("task :build do", "task", ":build"),
    ("defmodule Store do", "defmodule", "Store"),
    ("  defp get(name), do: name", "defp", "get"),
    # Lua
    ("function M.load(path)", "function", "M.load"),
    ("function M:get(name)", "function", "M:get"),
    ("local function load(path)", "function", "load"),
    # Swift and Kotlin
    ("func add(_ value: Int) {", "func", "add/_"),
    ("func move(to place: Int) {", "func", "move/to"),
    ("func move(by amount: Int, from start: Int) {", "func", "move/by/from"),
    ("extension Store: Shape {", "extension", "Store"),
    ("protocol Shape {", "protocol", "Shape"),
    ("fun load(path: String): String {", "fun", "load"),
    ("data class Point(val x: Int)", "class", "Point"),
    ("object Shapes {", "object", "Shapes"),
    # C#, Java, C and C++
    ("    public async Task<int> Load(string path)", "method", "Load"),
    ("    void load(String path) throws IOException {", "method", "load"),
    ("    private static final Map<String, List<Integer>> of(int a) {", "method", "of"),
    ("    public Store(String root) {", "method", "Store"),
    ("int main(int argc, char **argv) {", "method", "main"),
    ("void Store::load(const std::string &path) {", "method", "Store::load"),
    # PHP
    ("    public function load(string $path): string {", "function", "load"),
    ("    protected static function of()", "function", "of"),
    # SQL
    ("CREATE TABLE users (", "table", "users"),
    ("create table if not exists Users (", "table", "users"),
    ("CREATE OR REPLACE FUNCTION total(a int)", "function", "total"),
    ("CREATE UNIQUE INDEX users_name ON users (name);", "index", "users_name"),
    # CSS
    (".card {", "block", ".card"),
    (".card:hover > a {", "block", ".card:hover > a"),
    ("#main {", "block", "#main"),
    ("a, b {", "block", "a, b"),
    # Terraform
    ('resource "aws_instance" "web" {', "resource", "aws_instance\0web"),
    ('variable "size" {', "variable", "size"),
    ("  lifecycle {", "block", "lifecycle"),
    # shells
    ("load() {", "method", "load"),
    ("load-all() {", "method", "load-all"),
    ("function load {", "function", "load"),
    ("function load() {", "function", "load"),
]


@pytest.mark.parametrize(("line", "kind", "name"), DEFINITIONS, ids=[line.strip() for line, *_ in DEFINITIONS])
def test_a_definition_has_a_kind_and_a_name(line: str, kind: str, name: str) -> None:
    assert defined_name(line) == (kind, name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("  get size() {", "  set size(value) {"),
        ('it("adds", () => {', 'it("adds two", () => {'),
        ('app.get("/users", (request) => {', 'app.post("/users", (request) => {'),
        ('app.get("/users", (request) => {', 'app.get("/items", (request) => {'),
        ("impl From<A> for Error {", "impl From<B> for Error {"),
        ("func (s *Store) Close() error {", "func (c *Cache) Close() error {"),
        ("  def find(id)", "  def self.find(id)"),
        ("function M.load(path)", "function load(path)"),
        ("define_id!(UserId, {", "define_id!(OrderId, {"),
        ("func move(to place: Int) {", "func move(by amount: Int) {"),
        ('resource "aws_instance" "web" {', 'resource "aws_instance" "database" {'),
        (".card {", ".card:hover {"),
        ("CREATE TABLE users (", "CREATE VIEW users AS"),
    ],
)
def test_definitions_beside_each_other_are_told_apart(one: str, other: str) -> None:
    assert defined_name(one) != defined_name(other)
    assert defined_name(one) is not None and defined_name(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def load(path):", "async def load(path, mode='r'):"),
        ("function load(path) {", "export default async function load(path, mode) {"),
        ("func (s *Store) Get(name string) {", "func (store Store) Get(name string, size int) {"),
        ("it('adds', () => {", 'it("adds", async () => {'),
        ("const load = (path) => {", "export const load = async (path, mode) => {"),
        ("impl  Store {", "impl Store {"),
        ("create table Users (", "CREATE TABLE IF NOT EXISTS users ("),
        ("pub fn load(path: &str) {", "fn load(path: &str, mode: Mode) -> T {"),
    ],
)
def test_a_definition_keeps_its_name_where_its_header_changes(one: str, other: str) -> None:
    assert defined_name(one) == defined_name(other) is not None


@pytest.mark.parametrize(
    "line",
    [
        # blocks without a name, of which a file has many that begin alike
        "useEffect(() => {",
        "  useEffect(() => {",
        "items.map((item) => {",
        "return items.map((item) => {",
        "(function () {",
        "  return function () {",
        "new Promise((resolve) => {",
        "@media (max-width: 40em) {",
        # statements
        "if (a) {",
        "  } else {",
        "for (const item of items) {",
        "while true do",
        "switch (kind) {",
        "try {",
        "do {",
        "load(path)",
        "load(path) {",
        'print("a", "b",',
        "return load(path)",
        "x = 1",
        "name: value,",
        'import { a } from "b";',
        "from os import (",
        # prose
        "Text of a paragraph that ends with do",
        "The function loads a file.",
        "A class of its own is",
        "Class is a word.",
        "type the name of the file",
        "from here on it is new",
        # comments, decorators, closing rows, blank ones
        "// function load(path) {",
        "# def load(path):",
        "* class Store {",
        "@cached",
        '@app.get("/users")',
        "</div>",
        "}",
        "",
        "   ",
        "def f(" + "a, " * 200 + "):",
    ],
)
def test_what_begins_nothing_with_a_name(line: str) -> None:
    assert defined_name(line) is None


SETTERS = """\
class Store:
    @property
    def size(self):
        return 1

    @size.setter
    def size(self, value):
        pass

    @size.deleter
    def size(self):
        pass
"""
OVERLOADS = """\
@overload
def load(path: str) -> str: ...
@overload
def load(path: bytes) -> bytes: ...
def load(path):
    return path


@show.register
def _(value: int):
    return 1


@show.register
def _(value: str):
    return 2
"""


@pytest.mark.parametrize(
    ("code", "number"),
    [(SETTERS, 3), (OVERLOADS, 5)],
    ids=["setters", "overloads"],
)
def test_decorators_tell_functions_of_one_name_apart(code: str, number: int) -> None:
    rows = code.splitlines()
    names = [name for row, name in zip(rows, names_of(rows), strict=True) if name and "def " in row]
    assert len(names) == len(set(names)) == number


def test_a_plain_decorator_changes_no_name() -> None:
    assert names_of(["@cached", "def load(path):"]) == names_of(["", "def load(path):"]) == [None, ("def", "load")]


def test_a_decorator_further_up_changes_no_name() -> None:
    rows = ["@size.setter", "def size(self, value):", "    pass", "def size(self):"]
    assert names_of(rows)[3] == ("def", "size")


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("version: 1", "version"),
        ("version = 1", "version"),
        ('  "version": 1,', "version"),
        ("'version': 1,", "version"),
        ("- name: build", "name"),
        ("  - uses: actions/checkout@v4", "uses"),
        ("const size = 3;", "size"),
        ("export const size: number = 3;", "size"),
        ("size := 3", "size"),
        ("size: int = 3", "size"),
        ("val size: Int = 3", "size"),
        ("self.size = 3", "self.size"),
        ("bar=1,", "bar"),
        ("ENV PATH=/bin", "PATH"),
        ("ARG VERSION=1", "VERSION"),
        ("export PATH=/bin", "PATH"),
        ("color: red;", "color"),
        ("$size: 3px;", "$size"),
        ("@size: 3px;", "@size"),
        ("@name = 1", "@name"),
        ("requests==2.31", "requests"),
        ("requests>=2", "requests"),
        ("ruff~=0.5", "ruff"),
    ],
)
def test_a_line_that_sets_something_has_a_key(line: str, key: str) -> None:
    assert assigned_key(line) == key


@pytest.mark.parametrize(
    "line",
    [
        "key",
        "# key = 1",
        "if a == b:",
        "return a = 1",
        "foo(bar=1)",
        "a => b",
        "a += 1",
        "a[0] = 1",
        "std::cout << a",
        "a::b",
        "[section]",
        "The key: value",
        "",
        "https://example.org/one",
    ],
)
def test_a_line_that_sets_nothing_has_none(line: str) -> None:
    assert assigned_key(line) is None


def test_unclosed_strings_and_long_spaces_take_no_time() -> None:
    began = time.perf_counter()
    defined_name("it('" + "\\a" * 60 + " {")
    assigned_key("a:" + " " * 4000 + "x")
    assert time.perf_counter() - began < 0.1
