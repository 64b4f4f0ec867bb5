/* The Python door: calls with addresses and sizes as integers. Needs the stable ABI of Python 3.11 alone.
 *
 * __init__.py vouches for the lengths of the memory; here, what can be told from a number is checked. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

/* From this many elements on, other Python threads may run meanwhile. */
#define RELEASED 16384
#define LARGEST (INT64_MAX / 64)

/* The loops of an instruction set that this processor has. */
typedef struct {
    const char *name;
    const LoopTable *loops;
} Variant;

static Variant variants[3];
static int variant_count;
static const LoopTable *chosen;

static void find_variants(void) {
    variant_count = 0;
#ifdef HAVE_X86_LOOPS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        variants[variant_count++] = (Variant){"avx512", &avx512_loops};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
        variants[variant_count++] = (Variant){"avx2", &avx2_loops};
#endif
    variants[variant_count++] = (Variant){"baseline", &baseline_loops};
    chosen = variants[0].loops;
}

/* The arguments not read yet. Once one is wrong, the others are read for nothing, and an exception is set. */
typedef struct {
    PyObject *const *next, *const *end;
    bool failed;
} Arguments;

static PyObject *take(Arguments *arguments) {
    if (arguments->next == arguments->end) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "too few arguments");
        arguments->failed = true;
        return NULL;
    }
    return *arguments->next++;
}

static int64_t take_int(Arguments *arguments) {
    PyObject *object = take(arguments);
    if (object == NULL) return 0;
    long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) arguments->failed = true;
    return value;
}

static double take_double(Arguments *arguments) {
    PyObject *object = take(arguments);
    if (object == NULL) return 0;
    double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) arguments->failed = true;
    return value;
}

static void *take_address(Arguments *arguments, size_t alignment) {
    PyObject *object = take(arguments);
    if (object == NULL) return NULL;
    void *address = PyLong_AsVoidPtr(object);
    if (address == NULL && PyErr_Occurred()) {
        arguments->failed = true;
    } else if ((uintptr_t)address % alignment != 0) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "address %p is not a multiple of the element size, %zu", address, alignment);
        arguments->failed = true;
    }
    return address;
}

static size_t size_of(int64_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

static void fail(Arguments *arguments, const char *why) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, why);
    arguments->failed = true;
}

static Call take_call(Arguments *arguments) {
    Call call = {.loops = chosen};
    PyObject *object = take(arguments);
    if (object == NULL) return call;
    char *data;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(object, &data, &length) != 0 || length != sizeof(Geometry)) {
        fail(arguments, "the geometry has another length");
        return call;
    }
    memcpy(&call.geometry, data, sizeof(Geometry));
    const Geometry *g = &call.geometry;
    int64_t left = LARGEST;
    bool fits = g->samples >= 0 && g->channels >= 0 && g->positions >= 0;
    if (fits && g->samples > 0 && g->channels > 0 && g->positions > 0)
        fits = g->samples <= left && g->channels <= (left /= g->samples) && g->positions <= left / g->channels;
    if (!fits || g->channels > LARGEST / 64 || g->dtype < 0 || g->dtype >= DTYPES) fail(arguments, "no such geometry");
    int64_t threads = take_int(arguments);
    call.threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : (int)threads;
    return call;
}

static const void *take_elements(Arguments *arguments, const Call *call) {
    return take_address(arguments, size_of(call->geometry.dtype));
}

/* An address and a data type, float or double. */
static Vector take_vector(Arguments *arguments) {
    Vector vector;
    vector.data = take_address(arguments, 1);
    vector.dtype = take_int(arguments);
    if (vector.dtype != FLOAT32 && vector.dtype != FLOAT64) fail(arguments, "vectors are float32 or float64");
    if ((uintptr_t)vector.data % size_of(vector.dtype) != 0) fail(arguments, "a vector is not aligned");
    return vector;
}

static Parts take_parts(Arguments *arguments, const Call *call) {
    Parts parts;
    parts.rows = take_address(arguments, sizeof(double));
    parts.count = take_int(arguments);
    parts.step = take_int(arguments);
    parts.raw = false;
    if (parts.count < 1 || (parts.rows == NULL && call->geometry.channels > 0)) fail(arguments, "there must be one part or more");
    return parts;
}

static bool complete(Arguments *arguments) {
    if (!arguments->failed && arguments->next != arguments->end) {
        PyErr_SetString(PyExc_TypeError, "too many arguments");
        arguments->failed = true;
    }
    return !arguments->failed;
}

static bool is_large(const Call *call) {
    return call->geometry.samples * call->geometry.channels * call->geometry.positions >= RELEASED;
}

#define UNLOCKED(call, statement)                                  \
    do {                                                           \
        PyThreadState *saved = is_large(call) ? PyEval_SaveThread() : NULL; \
        statement;                                                 \
        if (saved != NULL) PyEval_RestoreThread(saved);            \
    } while (0)

static PyObject *finish(bool done) {
    if (!done) return PyErr_NoMemory();
    return Py_NewRef(Py_None);
}

static PyObject *door_pack_moments(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Arguments a = {args, args + count, false};
    Call call = take_call(&a);
    Pass pass = {0};
    pass.x = take_elements(&a, &call);
    pass.mask = take_address(&a, 1);
    bool raw = take_int(&a) != 0, done;
    double *payload = take_address(&a, sizeof(double));
    if (!complete(&a)) return NULL;
    UNLOCKED(&call, done = pack_moments(&call, &pass, raw, payload));
    return finish(done);
}

static PyObject *door_normalize_shared(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Arguments a = {args, args + count, false};
    Call call = take_call(&a);
    Pass pass = {0};
    pass.x = take_elements(&a, &call);
    pass.mask = take_address(&a, 1);
    pass.residual = take_elements(&a, &call);
    pass.relu = take_int(&a) != 0;
    Parts parts = take_parts(&a, &call);
    parts.raw = take_int(&a) != 0;
    Vector weight = take_vector(&a), bias = take_vector(&a);
    double eps = take_double(&a);
    Vector mean = take_vector(&a), var = take_vector(&a);
    Running running = {.mean = (void *)mean.data, .var = (void *)var.data, .mean_dtype = mean.dtype, .var_dtype = var.dtype};
    running.batches = take_address(&a, sizeof(int64_t));
    running.momentum = take_double(&a);
    pass.y = (void *)take_elements(&a, &call);
    double *stats = take_address(&a, sizeof(double)), *m2 = take_address(&a, sizeof(double));
    if (!complete(&a)) return NULL;
    bool done, finite = false;
    UNLOCKED(&call, done = normalize_shared(&call, &pass, &parts, &weight, &bias, eps, &running, stats, m2, &finite));
    if (!done) return PyErr_NoMemory();
    return Py_NewRef(finite ? Py_True : Py_False);
}

/* What the three functions of the backward have in common. */
static Affine take_backward(Arguments *arguments, const Call *call, Pass *pass) {
    pass->x = take_elements(arguments, call);
    pass->mask = take_address(arguments, 1);
    pass->grad = take_elements(arguments, call);
    pass->residual = take_elements(arguments, call);
    pass->relu = take_int(arguments) != 0;
    pass->limit = take_double(arguments);
    Affine affine;
    affine.stats = take_address(arguments, sizeof(double));
    affine.weight = take_vector(arguments);
    affine.bias = take_vector(arguments);
    return affine;
}

static bool sums_and_gradients(const Call *call, Pass *pass, const Affine *affine, double *payload,
                               const Vector *dweight, const Vector *dbias) {
    int64_t channels = call->geometry.channels;
    double *own = payload != NULL ? NULL : malloc((size_t)(2 * channels + 1) * sizeof(double));
    double *sums = payload != NULL ? payload : own;
    if (sums == NULL || !pack_gradient_sums(call, pass, affine, sums)) {
        free(own);
        return false;
    }
    if (dbias->data != NULL) write_vector(sums, channels, dbias->dtype, (void *)dbias->data);
    if (dweight->data != NULL) write_vector(sums + channels, channels, dweight->dtype, (void *)dweight->data);
    free(own);
    return true;
}

static PyObject *door_pack_gradient_sums(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Arguments a = {args, args + count, false};
    Call call = take_call(&a);
    Pass pass = {0};
    Affine affine = take_backward(&a, &call, &pass);
    double *payload = take_address(&a, sizeof(double));
    Vector dweight = take_vector(&a), dbias = take_vector(&a);
    if (!complete(&a)) return NULL;
    bool done;
    UNLOCKED(&call, done = sums_and_gradients(&call, &pass, &affine, payload, &dweight, &dbias));
    return finish(done);
}

static PyObject *door_input_gradient(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Arguments a = {args, args + count, false};
    Call call = take_call(&a);
    Pass pass = {0};
    Affine affine = take_backward(&a, &call, &pass);
    Parts parts = take_parts(&a, &call);
    pass.y = (void *)take_elements(&a, &call);
    pass.g = (void *)take_elements(&a, &call);
    if (!complete(&a)) return NULL;
    bool done;
    UNLOCKED(&call, done = input_gradient(&call, &pass, &affine, &parts));
    return finish(done);
}

static PyObject *door_relu_gradient(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    Arguments a = {args, args + count, false};
    Call call = take_call(&a);
    Pass pass = {0};
    Affine affine = take_backward(&a, &call, &pass);
    pass.relu = true;
    pass.g = (void *)take_elements(&a, &call);
    if (!complete(&a)) return NULL;
    bool done;
    UNLOCKED(&call, done = input_gradient(&call, &pass, &affine, NULL));
    return finish(done);
}

static PyObject *door_variants(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyTuple_New(variant_count);
    for (int i = 0; names != NULL && i < variant_count; i++) {
        PyObject *name = PyUnicode_FromString(variants[i].name);
        if (name == NULL || PyTuple_SetItem(names, i, name) != 0) {
            Py_DecRef(names);
            return NULL;
        }
    }
    return names;
}

static PyObject *door_choose(PyObject *module, PyObject *name) {
    (void)module;
    for (int i = 0; i < variant_count; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, variants[i].name) == 0) {
            chosen = variants[i].loops;
            return Py_NewRef(Py_None);
        }
    PyErr_Format(PyExc_ValueError, "this processor has no variant %R", name);
    return NULL;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))door_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(pack_moments),
    FAST(normalize_shared),
    FAST(pack_gradient_sums),
    FAST(input_gradient),
    FAST(relu_gradient),
    {"variants", door_variants, METH_NOARGS, "The instruction sets of this processor that there are loops for, best first."},
    {"choose", door_choose, METH_O, "Work with the loops of one of `variants()` from now on: for tests."},
    {NULL, NULL, 0, NULL},
};

static int prepare(PyObject *module) {
    (void)module;
    find_variants();
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)prepare}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = 0, .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
