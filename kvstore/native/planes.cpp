// Elements put together from their bytes, which lie apart by significance; and what a batch of
// frames says in front.
#include "planes.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "array.h"
#include "vector.h"

namespace kvstore {
namespace {

// A view of what an object with the buffer protocol holds.
class View {
   public:
    explicit View(py::handle object) {
        if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE)) throw py::error_already_set();
    }
    ~View() { PyBuffer_Release(&buffer_); }
    View(const View&) = delete;

    const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(buffer_.buf); }
    std::size_t size() const { return static_cast<std::size_t>(buffer_.len); }

   private:
    Py_buffer buffer_;
};

// One plane of one block.
struct Merge {
    const std::uint8_t* block;
    const std::size_t* firsts;  // in it, where the bytes of each significance begin
    std::size_t elements;
    std::uint8_t* out;
};

template <class Word>
inline __attribute__((always_inline)) void merge_words(const Merge& m) {
    Word* out = reinterpret_cast<Word*>(m.out);
    for (std::size_t e = 0; e < m.elements; e++) {
        Word word = 0;
        for (std::size_t d = 0; d < sizeof(Word); d++) {
            word = static_cast<Word>(word << 8 | m.block[m.firsts[d] + e]);
        }
        out[e] = word;
    }
}

KVSTORE_VECTOR void merge_2(const Merge& m) {
    const std::uint8_t *high = m.block + m.firsts[0], *low = m.block + m.firsts[1];
    auto* out = reinterpret_cast<std::uint16_t*>(m.out);
    for (std::size_t e = 0; e < m.elements; e++) {
        out[e] = static_cast<std::uint16_t>(high[e] << 8 | low[e]);
    }
}
KVSTORE_VECTOR void merge_4(const Merge& m) { merge_words<std::uint32_t>(m); }
KVSTORE_VECTOR void merge_8(const Merge& m) { merge_words<std::uint64_t>(m); }

void merge_plane(const Merge& m, std::size_t depth) {
    switch (depth) {
        case 1: std::memcpy(m.out, m.block + m.firsts[0], m.elements); break;
        case 2: merge_2(m); break;
        case 4: merge_4(m); break;
        default: merge_8(m);
    }
}

// Put blocks' elements together. firsts: for each plane where in a block its bytes of each
// significance begin, most significant first. planes: uint8 [any, bytes]; the i-th block goes to
// their row rows[i].
void merge(const py::sequence& blocks, const std::vector<std::vector<std::size_t>>& firsts,
           std::vector<Bytes>& planes, const Int64s& rows) {
    const auto count = static_cast<py::ssize_t>(blocks.size());
    if (rows.size() != count || planes.size() != firsts.size()) {
        throw py::value_error("blocks and rows, or planes and places, differ in number");
    }
    std::size_t nbytes = 0;
    for (std::size_t p = 0; p < planes.size(); p++) {
        const std::size_t depth = firsts[p].size();
        if (planes[p].ndim() != 2) throw py::value_error("planes are uint8 [any, bytes]");
        const auto size = static_cast<std::size_t>(planes[p].shape(1));
        if ((depth != 1 && depth != 2 && depth != 4 && depth != 8) || size % depth) {
            throw py::value_error("elements have 1, 2, 4 or 8 bytes");
        }
        for (const std::size_t first : firsts[p]) nbytes = std::max(nbytes, first + size / depth);
        check(rows, planes[p].shape(0));
    }
    for (py::ssize_t i = 0; i < count; i++) {
        const py::object block = blocks[i];
        const View view(block);
        if (view.size() < nbytes) throw py::value_error("a block is too short");
        for (std::size_t p = 0; p < planes.size(); p++) {
            const std::size_t depth = firsts[p].size();
            const auto size = static_cast<std::size_t>(planes[p].shape(1));
            std::uint8_t* out = planes[p].mutable_data() + size * rows.data()[i];
            merge_plane({view.data(), firsts[p].data(), size / depth, out}, depth);
        }
    }
}

template <class T>
bool same(const std::uint8_t* at, T value) {
    return !std::memcmp(at, &value, sizeof value);
}

py::object slice(const py::handle& object, std::size_t first, std::size_t last) {
    return object[py::slice(first, last, 1)];
}

// What each frame is made of: the checksum that it promises, its first 8 bytes; what that is of; and
// the payload. None unless each goes on with its block's id (8 bytes), what all have in common and
// the size of the payload (4 bytes).
py::object open_frames(const py::list& frames, const Int64s& ids, const py::bytes& common) {
    if (ids.size() != static_cast<py::ssize_t>(frames.size())) {
        throw py::value_error("frames and ids differ in number");
    }
    const std::string_view shared = common;
    const std::size_t end = 16 + shared.size() + 4;
    py::list promised(frames.size()), bodies(frames.size()), payloads(frames.size());
    for (std::size_t i = 0; i < frames.size(); i++) {
        const py::memoryview whole(frames[i]);  // slices of it copy nothing
        const View frame(whole);
        const std::uint8_t* head = frame.data();
        if (frame.size() < end || frame.size() - end > UINT32_MAX ||
            !same(head + 8, ids.data()[i]) ||
            std::memcmp(head + 16, shared.data(), shared.size()) ||
            !same(head + end - 4, static_cast<std::uint32_t>(frame.size() - end))) {
            return py::none();
        }
        std::uint64_t checksum;
        std::memcpy(&checksum, head, sizeof checksum);
        promised[i] = py::int_(checksum);
        bodies[i] = slice(whole, 8, frame.size());
        payloads[i] = slice(whole, end, frame.size());
    }
    return py::make_tuple(promised, bodies, payloads);
}

// The frames at these places of a table in front of packs (kvstore/tiers/pack.py): an entry of 4
// bytes says where a frame begins, the next where it ends. which: of the packs, for each place.
// None where there is no such entry.
py::object cut_frames(const py::list& packs, const py::list& which, const Int64s& places) {
    if (places.size() != static_cast<py::ssize_t>(which.size())) {
        throw py::value_error("packs and places differ in number");
    }
    py::list frames(which.size());
    for (std::size_t i = 0; i < which.size(); i++) {
        const py::object pack = packs[py::cast<std::size_t>(which[i])];
        const View view(pack);
        const std::int64_t at = 4 * places.data()[i];
        if (at < 0 || view.size() < static_cast<std::size_t>(at) + 8) return py::none();
        std::uint32_t bounds[2];
        std::memcpy(bounds, view.data() + at, sizeof bounds);
        frames[i] = slice(pack, bounds[0], bounds[1]);
    }
    return frames;
}

}  // namespace

void bind_planes(py::module_& module) {
    module.def("merge", &merge, given("blocks"), py::arg("firsts"), given("planes"),
               given("rows"));
    module.def("open_frames", &open_frames, given("frames"), given("ids"), given("common"));
    module.def("cut_frames", &cut_frames, given("packs"), given("which"), given("places"));
}

}  // namespace kvstore
