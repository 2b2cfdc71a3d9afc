"""C++ kernels of one graph as a few translation units instead of one each.

Inductor compiles every kernel alone, and most of that time is the compiler reading and optimising the same headers.
Here all kernels of a graph are written into as many files as there are compilers to run, each file one Python
extension module with a function per kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_UNITS = 8
MODULE = "kernel"  # inductor loads the extension module under this name

_BINDINGS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>

static void* (*tensor_data)(PyObject*);
template <typename T> static T argument(PyObject* x) { return static_cast<T>(tensor_data(x)); }
template <> int64_t argument<int64_t>(PyObject* x) {
    int64_t value = PyLong_AsLongLong(x);
    if (value == -1 && PyErr_Occurred()) throw std::runtime_error("kernel argument: expected an int");
    return value;
}
template <> double argument<double>(PyObject* x) {
    double value = PyFloat_AsDouble(x);
    if (value == -1.0 && PyErr_Occurred()) throw std::runtime_error("kernel argument: expected a float");
    return value;
}
template <> float argument<float>(PyObject* x) { return static_cast<float>(argument<double>(x)); }
"""

_FUNCTION = """
static PyObject* call_{i}(PyObject*, PyObject* const* args, Py_ssize_t n) {{
    try {{
        if (n != {count}) throw std::runtime_error("kernel {i} takes {count} arguments");
        k{i}::kernel({arguments});
    }} catch (const std::exception& error) {{
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }}
    Py_RETURN_NONE;
}}
"""

_MODULE = """
static PyMethodDef methods[] = {{
    {methods}
    {{nullptr, nullptr, 0, nullptr}}}};
static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "{module}", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_{module}(void) {{
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {{
        PyErr_SetString(PyExc_ImportError, "compiled kernels are loaded by inductor only");
        return nullptr;
    }}
    tensor_data = reinterpret_cast<decltype(tensor_data)>(std::strtoull(address, nullptr, 10));
    return PyModule_Create(&definition);
}}
"""


def group(sources: Sequence[str], units: int) -> list[list[int]]:
    """Indices of `sources` dealt to at most `units` groups of about the same length; every group has one."""
    groups: list[list[int]] = [[] for _ in range(min(units, MAX_UNITS, len(sources)))]
    sizes = [0] * len(groups)
    for i in sorted(range(len(sources)), key=lambda i: (-len(sources[i]), i)):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(i)
        sizes[smallest] += len(sources[i])
    return groups


def translation_unit(kernels: Sequence[tuple[Sequence[str], str]]) -> str:
    """The source of an extension module whose function f{i} is the i-th of `kernels`: (argument types, source).

    Every source defines `kernel(...)` with C linkage; namespaces keep them apart.
    """
    includes: dict[str, None] = {}
    bodies, functions, methods = [], [], []
    for i, (types, source) in enumerate(kernels):
        includes |= dict.fromkeys(re.findall(r"^\s*#include.*$", source, re.M))
        body = re.sub(r"^\s*#include.*$", "", source, flags=re.M).replace('extern "C"', "")
        bodies.append(f"namespace k{i} {{\n{body}\n}}")
        arguments = ", ".join(f"argument<{t.replace('const ', '')}>(args[{n}])" for n, t in enumerate(types))
        functions.append(_FUNCTION.format(i=i, count=len(types), arguments=arguments))
        methods.append(f'{{"f{i}", reinterpret_cast<PyCFunction>(call_{i}), METH_FASTCALL, nullptr}},')
    module = _MODULE.format(methods="\n    ".join(methods), module=MODULE)
    return "\n".join([*includes, *bodies, _BINDINGS, *functions, module])
