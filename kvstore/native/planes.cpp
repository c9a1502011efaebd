// Elements put together from their bytes, which lie apart by significance; and what a batch of
// frames says in front.
#include "planes.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <string_view>
#include <utility>
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

// Bytes that the caller fills before anybody else sees them.
py::bytes uninitialized(std::size_t size) {
    PyObject* made = PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(size));
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(made);
}

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

template <class Word>
inline __attribute__((always_inline)) void split_words(const std::uint8_t* plane,
                                                       const std::size_t* firsts,
                                                       std::size_t elements, std::uint8_t* block) {
    const Word* words = reinterpret_cast<const Word*>(plane);
    for (std::size_t d = 0; d < sizeof(Word); d++) {
        const std::size_t shift = 8 * (sizeof(Word) - 1 - d);
        std::uint8_t* out = block + firsts[d];
        for (std::size_t e = 0; e < elements; e++) {
            out[e] = static_cast<std::uint8_t>(words[e] >> shift);
        }
    }
}

KVSTORE_VECTOR void split_plane(const std::uint8_t* plane, const std::size_t* firsts,
                                std::size_t depth, std::size_t elements, std::uint8_t* block) {
    switch (depth) {
        case 1: std::memcpy(block + firsts[0], plane, elements); break;
        case 2: split_words<std::uint16_t>(plane, firsts, elements, block); break;
        case 4: split_words<std::uint32_t>(plane, firsts, elements, block); break;
        default: split_words<std::uint64_t>(plane, firsts, elements, block);
    }
}

using Firsts = std::vector<std::vector<std::size_t>>;

// Check planes uint8 [any, bytes] and rows of theirs, and where in a block their bytes lie; return
// how many bytes a block has at least.
std::size_t check_planes(const std::vector<Bytes>& planes, const Int64s& rows,
                         const Firsts& firsts) {
    if (planes.size() != firsts.size()) throw py::value_error("planes differ in number");
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
    return nbytes;
}

// Take elements apart: the i-th block is made of the planes' row rows[i]. firsts: as of decode.
void take_apart(const std::vector<Bytes>& planes, const Int64s& rows, const Firsts& firsts,
                Bytes& blocks) {
    const std::size_t nbytes = check_planes(planes, rows, firsts);
    if (blocks.ndim() != 2 || blocks.shape(0) != rows.size() ||
        static_cast<std::size_t>(blocks.shape(1)) < nbytes) {
        throw py::value_error("blocks are uint8 [rows, bytes]");
    }
    const std::size_t stride = blocks.shape(1);
    std::uint8_t* out = blocks.mutable_data();
    py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < rows.size(); i++) {
        for (std::size_t p = 0; p < planes.size(); p++) {
            const std::size_t depth = firsts[p].size(), size = planes[p].shape(1);
            split_plane(planes[p].data() + size * rows.data()[i], firsts[p].data(), depth,
                        size / depth, out + stride * i);
        }
    }
}

template <class T>
bool same(const std::uint8_t* at, T value) {
    return !std::memcmp(at, &value, sizeof value);
}

// Frames of blocks, each: the checksum by `hash` of all that follows; the block's id; `common`; the
// size of the payload. The payload is one zstd frame (RFC 8878): `zstd_header`; the block's first
// `raw` bytes as raw blocks; and of a zstd frame of the others, `tops`, all but the header of `skip`
// bytes. Raw blocks change nothing of a decoder's state, so those of a frame made apart may follow.
py::list make_frames(const Int64s& ids, const py::bytes& common, const Bytes& blocks,
                     std::size_t raw, const py::sequence& tops, std::size_t skip,
                     const py::bytes& zstd_header, const py::function& hash) {
    constexpr std::size_t MOST = 1 << 17;  // in a block of zstd's
    const auto count = static_cast<py::ssize_t>(tops.size());
    if (ids.size() != count || blocks.ndim() != 2 || blocks.shape(0) != count ||
        static_cast<std::size_t>(blocks.shape(1)) < raw) {
        throw py::value_error("ids, blocks and their compressed ends do not fit together");
    }
    const std::string_view shared = common, header = zstd_header;
    const std::size_t parts = (raw + MOST - 1) / MOST, head = 16 + shared.size() + 4;
    std::deque<View> ends;
    std::vector<py::bytes> frames;
    std::vector<std::pair<char*, std::size_t>> places;
    for (py::ssize_t i = 0; i < count; i++) {
        const py::object top = tops[i];
        ends.emplace_back(top);
        if (ends.back().size() < skip) throw py::value_error("a zstd frame is too short");
        const std::size_t size = head + header.size() + 3 * parts + raw + ends.back().size() - skip;
        frames.push_back(uninitialized(size));
        places.emplace_back(PyBytes_AS_STRING(frames.back().ptr()), size);
    }
    {
        py::gil_scoped_release release;  // copies of megabytes would keep all other threads waiting
        for (py::ssize_t i = 0; i < count; i++) {
            auto [at, nbytes] = places[i];
            const auto put = [&at = at](const void* data, std::size_t size) {
                std::memcpy(at, data, size);
                at += size;
            };
            const std::uint64_t unknown = 0;
            const auto payload = static_cast<std::uint32_t>(nbytes - head);
            put(&unknown, sizeof unknown);
            put(&ids.data()[i], sizeof(std::int64_t));
            put(shared.data(), shared.size());
            put(&payload, sizeof payload);
            put(header.data(), header.size());
            const std::uint8_t* block = blocks.data() + blocks.shape(1) * i;
            for (std::size_t first = 0; first < raw; first += MOST) {
                const std::size_t part = std::min(MOST, raw - first);
                const auto raw_header = static_cast<std::uint32_t>(part << 3);
                put(&raw_header, 3);
                put(block + first, part);
            }
            put(ends[i].data() + skip, ends[i].size() - skip);
        }
    }
    for (const auto& [start, size] : places) {
        const py::memoryview body =
            py::memoryview::from_memory(start + 8, static_cast<py::ssize_t>(size - 8));
        const std::uint64_t checksum = py::cast<std::uint64_t>(hash(body));
        std::memcpy(start, &checksum, sizeof checksum);
    }
    return py::cast(frames);
}

// Packs of these frames (kvstore/tiers/pack.py), with counts[i] of them each: a table of where each
// begins and the last ends, 4 bytes an entry, and the frames.
std::vector<py::bytes> join_frames(const py::sequence& frames,
                                   const std::vector<std::size_t>& counts) {
    std::deque<View> views;
    for (std::size_t i = 0; i < frames.size(); i++) {
        const py::object frame = frames[i];
        views.emplace_back(frame);
    }
    std::vector<py::bytes> packs;
    std::vector<char*> places;
    std::size_t first = 0;
    for (const std::size_t count : counts) {
        if (count > views.size() - first) {
            throw py::value_error("packs of more frames than there are");
        }
        std::size_t size = 4 * (count + 1);
        for (std::size_t i = first; i < first + count; i++) size += views[i].size();
        if (size > UINT32_MAX) throw py::value_error("a pack of more than 4 GiB");
        packs.push_back(uninitialized(size));
        places.push_back(PyBytes_AS_STRING(packs.back().ptr()));
        first += count;
    }
    if (first < views.size()) throw py::value_error("packs of fewer frames than there are");
    py::gil_scoped_release release;
    auto view = views.begin();
    for (std::size_t p = 0; p < counts.size(); p++) {
        auto at = static_cast<std::uint32_t>(4 * (counts[p] + 1));
        std::memcpy(places[p], &at, sizeof at);
        for (std::size_t i = 1; i <= counts[p]; i++, ++view) {
            std::memcpy(places[p] + at, view->data(), view->size());
            at += static_cast<std::uint32_t>(view->size());
            std::memcpy(places[p] + 4 * i, &at, sizeof at);
        }
    }
    return packs;
}

py::object slice(const py::handle& object, std::size_t first, std::size_t last) {
    return object[py::slice(first, last, 1)];
}

// Whether this is the frame of that block: the checksum by `hash` of all that follows (8 bytes), the
// block's id (8 bytes), what all have in common, the size of the payload (4 bytes) and the payload.
bool intact(const py::memoryview& whole, std::int64_t id, std::string_view common,
            const py::function& hash) {
    const View frame(whole);
    const std::uint8_t* head = frame.data();
    const std::size_t end = 16 + common.size() + 4;
    return frame.size() >= end && frame.size() - end <= UINT32_MAX && same(head + 8, id) &&
           !std::memcmp(head + 16, common.data(), common.size()) &&
           same(head + end - 4, static_cast<std::uint32_t>(frame.size() - end)) &&
           same(head, py::cast<std::uint64_t>(hash(slice(whole, 8, frame.size()))));
}

// Verify frames, unpack their payloads and put each one's block together as soon as it comes: what
// is written and read again then is in the processor's nearest cache. firsts: for each plane where
// in a block its bytes of each significance begin, most significant first. planes: uint8 [any,
// bytes]; the i-th block goes to their row rows[i]. No planes: verify alone. Returns how many there
// are before the first that is not intact, or whose payload `unpack` refuses by `refusal`.
std::size_t decode(const py::list& frames, const Int64s& ids, const py::bytes& common,
                   std::size_t nbytes, const py::function& hash, const py::function& unpack,
                   const py::object& refusal, const Firsts& firsts, std::vector<Bytes>& planes,
                   const Int64s& rows) {
    const auto count = static_cast<py::ssize_t>(frames.size());
    if (ids.size() != count || rows.size() != count) {
        throw py::value_error("frames, ids and rows differ in number");
    }
    if (check_planes(planes, rows, firsts) > nbytes) throw py::value_error("a block is too short");
    const std::size_t end = 16 + std::string_view(common).size() + 4;
    for (py::ssize_t i = 0; i < count; i++) {
        const py::memoryview whole(frames[i]);  // slices of it copy nothing
        if (!intact(whole, ids.data()[i], common, hash)) return i;
        py::object block;
        try {
            block = unpack(slice(whole, end, View(whole).size()));
        } catch (const py::error_already_set& error) {
            if (error.matches(refusal)) return i;
            throw;
        }
        const View view(block);
        if (view.size() != nbytes) throw py::value_error("a block of another size");
        for (std::size_t p = 0; p < planes.size(); p++) {
            const std::size_t depth = firsts[p].size();
            const auto size = static_cast<std::size_t>(planes[p].shape(1));
            std::uint8_t* out = planes[p].mutable_data() + size * rows.data()[i];
            merge_plane({view.data(), firsts[p].data(), size / depth, out}, depth);
        }
    }
    return count;
}

// The frames at these places of a table in front of packs (kvstore/tiers/pack.py): an entry of 4
// bytes says where a frame begins, the next where it ends. which: of the packs, for each location,
// whose lowest `bits` are the place. None where there is no such entry.
py::object cut_frames(const py::list& packs, const py::list& which, const Int64s& locations,
                      int bits) {
    if (locations.size() != static_cast<py::ssize_t>(which.size())) {
        throw py::value_error("packs and locations differ in number");
    }
    if (bits < 1 || bits > 32) throw py::value_error("places have 1 to 32 bits");
    const std::uint64_t mask = (std::uint64_t{1} << bits) - 1;
    py::list frames(which.size());
    for (std::size_t i = 0; i < which.size(); i++) {
        const py::object pack = packs[py::cast<std::size_t>(which[i])];
        const View view(pack);
        const std::uint64_t place = static_cast<std::uint64_t>(locations.data()[i]) & mask;
        if (view.size() < 4 * place + 8) return py::none();
        std::uint32_t bounds[2];
        std::memcpy(bounds, view.data() + 4 * place, sizeof bounds);
        frames[i] = slice(pack, bounds[0], bounds[1]);
    }
    return frames;
}

}  // namespace

void bind_planes(py::module_& module) {
    module.def("take_apart", &take_apart, given("planes"), given("rows"), py::arg("firsts"),
               given("blocks"));
    module.def("make_frames", &make_frames, given("ids"), given("common"), given("blocks"),
               py::arg("raw"), given("tops"), py::arg("skip"), given("zstd_header"),
               py::arg("hash"));
    module.def("join_frames", &join_frames, py::arg("frames"), py::arg("counts"));
    module.def("decode", &decode, given("frames"), given("ids"), given("common"),
               py::arg("nbytes"), py::arg("hash"), py::arg("unpack"), py::arg("refusal"),
               py::arg("firsts"), given("planes"), given("rows"));
    module.def("cut_frames", &cut_frames, given("packs"), given("which"),
               given("locations"), py::arg("bits"));
}

}  // namespace kvstore
