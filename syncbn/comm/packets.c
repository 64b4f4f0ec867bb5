/* The smooth course of an exchange over Unix sockets, in one call from Python, and the sum of what came.
 *
 * A rank writes its frame to each peer and reads theirs, as sockets.py describes. Whatever does not go smoothly is left
 * to sockets.py: a full buffer, a closed connection, a packet of another length, a peer that is late. So this file
 * decides nothing; what it saves is the way through the interpreter, which is the longer part of a short exchange, and
 * most so where ranks outnumber cores and each finds the caches full of the others' code.
 *
 * Needs Linux and the stable ABI of Python 3.11. */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <sched.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* How far an exchange got. */
typedef struct {
    Py_ssize_t sent;  /* peers that were written to */
    Py_ssize_t read;  /* peers whose packet was read, all of the length of this rank's */
    ssize_t other;    /* length of one more packet, which has another length; -1 if there is none */
    bool interrupted; /* by a signal, before the packet of the next peer */
} Course;

/* A core that was given away for as long, in nanoseconds, went to somebody who computes: a rank that is behind, or, if
 * it was longer, another program. */
#define TAKEN INT64_C(200000)
#define TAKEN_BY_OTHERS INT64_C(1500000)
/* A rank then sleeps at once in its next exchanges: the system wakes a sleeper sooner than it gives back a core. In 4 of
 * them, in 64 if others took it, and each time it happens again in twice as many, up to 1024. */
#define FEWEST 4
#define OTHERS_DOUBLE 4
#define MOST_DOUBLE 8

/* The descriptors of all peers, and how the next exchange waits for them. */
typedef struct {
    int32_t pause;   /* exchanges in which not to look */
    int32_t doubled; /* how often the next pause is to be doubled */
    int numbers[];
} Ends;

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Length of the next packet, 0 if the peer has closed, -1 with errno set.
 *
 * The kernel looks for a packet first, and then whether the peer has closed: one that sent its packet and closed in
 * between seems to have sent nothing. So its end is believed when it is told twice. */
static ssize_t receive(int end, const Py_buffer *buffer, int flags) {
    ssize_t length = recv(end, buffer->buf, (size_t)buffer->len, flags | MSG_TRUNC);
    return length != 0 ? length : recv(end, buffer->buf, (size_t)buffer->len, MSG_DONTWAIT | MSG_TRUNC);
}

/* Looks for so many nanoseconds whether a packet is there, and lets others have the core meanwhile; then sleeps. */
static ssize_t read_soon(int end, const Py_buffer *buffer, int64_t looking, Ends *ends) {
    if (ends->pause == 0 && looking > 0) {
        int64_t const start = now();
        for (int64_t before = start, after; before - start < looking; before = after) {
            ssize_t length = receive(end, buffer, MSG_DONTWAIT);
            if (length >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
                if (before != start) ends->doubled = 0;
                return length;
            }
            sched_yield();
            after = now();
            if (after - before > TAKEN) {
                if (after - before > TAKEN_BY_OTHERS && ends->doubled < OTHERS_DOUBLE) ends->doubled = OTHERS_DOUBLE;
                ends->pause = FEWEST << ends->doubled;
                if (ends->doubled < MOST_DOUBLE) ends->doubled++;
                break;
            }
        }
    }
    return receive(end, buffer, 0);
}

static void send_all(Course *course, const Ends *ends, Py_ssize_t count, const Py_buffer *frame) {
    while (course->sent < count &&
           send(ends->numbers[course->sent], frame->buf, (size_t)frame->len, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        course->sent++;
}

static void read_all(Course *course, Ends *ends, Py_ssize_t count, const Py_buffer *buffers, Py_ssize_t expected,
                     int64_t looking) {
    course->interrupted = false;
    for (; course->read < count; course->read++) {
        ssize_t length = read_soon(ends->numbers[course->read], &buffers[course->read], looking, ends);
        if (length == expected) continue;
        if (length >= 0) course->other = length;
        course->interrupted = length < 0 && errno == EINTR;
        return;
    }
}

/* Takes the buffers of `views`, all or none; false if an exception is set. */
static bool take_buffers(PyObject *views, Py_ssize_t count, Py_buffer *buffers) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *view = PyList_GetItem(views, i);
        if (view == NULL || PyObject_GetBuffer(view, &buffers[i], PyBUF_WRITABLE) != 0) {
            while (i-- > 0) PyBuffer_Release(&buffers[i]);
            return false;
        }
    }
    return true;
}

/* The exchange itself; false if a handler of a signal raised. */
static bool run(Course *course, Ends *ends, Py_ssize_t count, const Py_buffer *frame, const Py_buffer *buffers,
                int64_t looking) {
    PyThreadState *state = PyEval_SaveThread();
    if (ends->pause > 0) ends->pause--;
    send_all(course, ends, count, frame);
    if (course->sent == count) read_all(course, ends, count, buffers, frame->len, looking);
    PyEval_RestoreThread(state);
    while (course->interrupted) {
        if (PyErr_CheckSignals() != 0) return false;
        state = PyEval_SaveThread();
        read_all(course, ends, count, buffers, frame->len, looking);
        PyEval_RestoreThread(state);
    }
    return true;
}

PyDoc_STRVAR(swap_doc,
             "swap(ends: bytearray, frame: memoryview, buffers: list[memoryview], looking: int, /)\n\n"
             "Write the frame to all ends and read a packet of each into its buffer, looking for so many nanoseconds "
             "before it sleeps. The ends are two int32, zero at first, and descriptors as C ints.\n\n"
             "Returns None if all packets are as long as the frame, else how far it got: how many ends were written "
             "to, how many packets were read, and the length of one more that has another length, or -1.");

static PyObject *swap(PyObject *module, PyObject *const *arguments, Py_ssize_t given) {
    (void)module;
    if (given != 4 || !PyList_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "swap takes ends, a frame, a list of buffers, and nanoseconds");
        return NULL;
    }
    int64_t const looking = PyLong_AsLongLong(arguments[3]);
    if (looking == -1 && PyErr_Occurred()) return NULL;
    Py_ssize_t const count = PyList_Size(arguments[2]);
    Py_buffer ends, frame;
    if (PyObject_GetBuffer(arguments[0], &ends, PyBUF_WRITABLE) != 0) return NULL;
    if (PyObject_GetBuffer(arguments[1], &frame, PyBUF_SIMPLE) != 0) {
        PyBuffer_Release(&ends);
        return NULL;
    }
    PyObject *result = NULL;
    Py_buffer *buffers = PyMem_Malloc((size_t)count * sizeof(Py_buffer) + 1);
    if (buffers == NULL) {
        PyErr_NoMemory();
    } else if (ends.len != (Py_ssize_t)(sizeof(Ends) + (size_t)count * sizeof(int)) ||
               (uintptr_t)ends.buf % sizeof(int32_t) != 0) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of ends do not go with %zd buffers", ends.len, count);
    } else if (take_buffers(arguments[2], count, buffers)) {
        Course course = {.other = -1};
        if (run(&course, ends.buf, count, &frame, buffers, looking))
            result = course.read == count ? Py_NewRef(Py_None)
                                          : Py_BuildValue("nnn", course.sent, course.read, (Py_ssize_t)course.other);
        for (Py_ssize_t i = 0; i < count; i++) PyBuffer_Release(&buffers[i]);
    }
    PyMem_Free(buffers);
    PyBuffer_Release(&frame);
    PyBuffer_Release(&ends);
    return result;
}

PyDoc_STRVAR(add_rows_doc, "add_rows(rows: buffer, start: int, step: int, count: int, total: int, width: int, /)\n\n"
                           "Write to the address total the sum of so many rows of width float64, in order: those that "
                           "begin at byte start of rows, step bytes apart.");

static PyObject *add_rows(PyObject *module, PyObject *arguments) {
    (void)module;
    Py_buffer rows;
    Py_ssize_t start, step, count, width;
    unsigned long long address;
    if (!PyArg_ParseTuple(arguments, "y*nnnKn", &rows, &start, &step, &count, &address, &width)) return NULL;
    Py_ssize_t const most = rows.len / 8;
    bool fits = width >= 0 && width <= most && start >= 0 && start % 8 == 0 && step >= 0 && step % 8 == 0 &&
                count >= 1 && start / 8 <= most - width &&
                (step == 0 || count - 1 <= (most - width - start / 8) / (step / 8)) &&
                (uintptr_t)rows.buf % 8 == 0 && address % 8 == 0;
    if (fits) {
        double *sum = (double *)(uintptr_t)address;
        memcpy(sum, (char *)rows.buf + start, (size_t)width * 8);
        for (Py_ssize_t row = 1; row < count; row++) {
            const double *part = (const double *)((char *)rows.buf + start + row * step);
            for (Py_ssize_t i = 0; i < width; i++) sum[i] += part[i];
        }
    } else {
        PyErr_Format(PyExc_ValueError, "%zd rows of %zd float64, %zd bytes apart from byte %zd on, are not in %zd bytes",
                     count, width, step, start, rows.len);
    }
    PyBuffer_Release(&rows);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef methods[] = {
    {"swap", (PyCFunction)(void (*)(void))swap, METH_FASTCALL, swap_doc},
    {"add_rows", add_rows, METH_VARARGS, add_rows_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "_packets", .m_size = 0, .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__packets(void) { return PyModuleDef_Init(&definition); }
