/* The floor: an NBD server of one raw file, as little as there can be. No layers, no map, no limits, no TLS.
 *
 * A thread for each connection reads what the socket holds, answers every whole request in it, and sends all replies
 * at once. It believes its clients. Usage: raw_server FILE unix PATH | raw_server FILE tcp PORT. */
#include <endian.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/un.h>
#include <unistd.h>

enum { REQUEST = 28, REPLY = 16, MAX_LENGTH = 32 << 20, BUFFER = MAX_LENGTH + (1 << 20), BATCH = 1 << 20 };
enum { READ, WRITE, DISC, FLUSH };
enum { EXPORT_FLAGS = 1 | 4 | 8 | 256 }; /* HAS_FLAGS, SEND_FLUSH, SEND_FUA, CAN_MULTI_CONN */
static int file;
static uint64_t size;
#define put16(at, value) memcpy(at, &(uint16_t){htobe16(value)}, 2)
#define put32(at, value) memcpy(at, &(uint32_t){htobe32(value)}, 4)
#define put64(at, value) memcpy(at, &(uint64_t){htobe64(value)}, 8)
static uint64_t get(const char *at, int width) { /* big endian, of `width` bytes */
    uint64_t value = 0;
    return memcpy((char *)&value + 8 - width, at, width), be64toh(value);
}

static int send_all(int fd, const char *from, size_t length) {
    while (length) {
        ssize_t sent = send(fd, from, length, MSG_NOSIGNAL);
        if (sent <= 0) return -1;
        from += sent, length -= sent;
    }
    return 0;
}

static int receive(int fd, char *to, size_t length) {
    return length && recv(fd, to, length, MSG_WAITALL) != (ssize_t)length;
}

static int answer_option(int fd, uint32_t option, uint32_t type, const char *data, uint32_t length) {
    char reply[64];
    put64(reply, 0x3e889045565a9), put32(reply + 8, option), put32(reply + 12, type), put32(reply + 16, length);
    memcpy(reply + 20, data, length);
    return send_all(fd, reply, 20 + length);
}

/* 0 when the transmission phase begins. */
static int negotiate(int fd, char *buffer) {
    char hello[18], flags[4], head[16], info[134] = {0};
    memcpy(hello, "NBDMAGICIHAVEOPT", 16), put16(hello + 16, 3); /* FIXED_NEWSTYLE, NO_ZEROES */
    if (send_all(fd, hello, 18) || receive(fd, flags, 4)) return -1;
    while (receive(fd, head, 16) == 0) {
        uint32_t option = get(head + 8, 4), length = get(head + 12, 4);
        if (length > 65536 || receive(fd, buffer, length)) return -1;
        if (option == 1) { /* EXPORT_NAME */
            put64(info, size), put16(info + 8, EXPORT_FLAGS);
            return send_all(fd, info, get(flags, 4) & 2 ? 10 : 134);
        } else if (option == 6 || option == 7) { /* INFO, GO; every name is the file's */
            put16(info, 0), put64(info + 2, size), put16(info + 10, EXPORT_FLAGS);
            if (answer_option(fd, option, 3, info, 12) || answer_option(fd, option, 1, "", 0)) return -1;
            if (option == 7) return 0;
        } else if (answer_option(fd, option, option == 2 ? 1 : 0x80000001, "", 0) || option == 2) {
            return -1;
        }
    }
    return -1;
}

/* Carry one request out and put its reply at `out`; how long that is, or -1. The payload of a write follows the head. */
static ssize_t serve_request(const char *request, char *out) {
    uint64_t offset = get(request + 16, 8);
    uint32_t length = get(request + 24, 4), error = 0;
    uint16_t command = get(request + 6, 2), fua = get(request + 4, 2) & 1;
    size_t extra = 0;
    if (command == READ) {
        if (pread(file, out + REPLY, length, offset) != (ssize_t)length) error = 5;
        else extra = length;
    } else if (command == WRITE) {
        if (offset + length > size) error = 28;
        else if (pwrite(file, request + REQUEST, length, offset) != (ssize_t)length || (fua && fdatasync(file))) error = 5;
    } else {
        error = command != FLUSH ? 22 : fdatasync(file) ? 5 : 0;
    }
    put32(out, 0x67446698), put32(out + 4, error), memcpy(out + 8, request + 8, 8);
    return REPLY + extra;
}

static void transmit(int fd, char *in, char *out) {
    size_t have = 0, want = REQUEST; /* bytes in the buffer; bytes up to the end of the request that is not whole */
    for (;;) {
        size_t room = want > BATCH ? want - have : BATCH - have, done = 0, ready = 0;
        ssize_t got = recv(fd, in + have, room, 0);
        if (got <= 0) return;
        have += got, want = REQUEST;
        while (have - done >= REQUEST) {
            uint32_t length = get(in + done + 24, 4);
            uint16_t command = get(in + done + 6, 2);
            if (get(in + done, 4) != 0x25609513 || command == DISC || length > MAX_LENGTH) {
                return (void)send_all(fd, out, ready);
            }
            want = REQUEST + (command == WRITE ? length : 0);
            if (have - done < want) break;
            if (ready + length > BATCH) {
                if (send_all(fd, out, ready)) return;
                ready = 0;
            }
            ready += serve_request(in + done, out + ready);
            done += want, want = REQUEST;
        }
        if (ready && send_all(fd, out, ready)) return;
        memmove(in, in + done, have - done);
        have -= done;
    }
}

static void *serve_connection(void *given) {
    int fd = (intptr_t)given;
    char *buffers = mmap(NULL, 2 * BUFFER, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffers == MAP_FAILED) exit(1);
    if (negotiate(fd, buffers) == 0) transmit(fd, buffers, buffers + BUFFER);
    munmap(buffers, 2 * BUFFER), close(fd);
    return NULL;
}

int main(int count, char **arguments) {
    if (count != 4) return 2;
    int is_tcp = strcmp(arguments[2], "tcp") == 0, yes = 1;
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in inet = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    strncpy(local.sun_path, arguments[3], sizeof local.sun_path - 1), inet.sin_port = htons(atoi(arguments[3]));
    file = open(arguments[1], O_RDWR);
    int listener = socket(is_tcp ? AF_INET : AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr *address = is_tcp ? (struct sockaddr *)&inet : (struct sockaddr *)&local;
    if (file < 0 || bind(listener, address, is_tcp ? sizeof inet : sizeof local) || listen(listener, 64)) {
        return perror("raw_server"), 1;
    }
    size = lseek(file, 0, SEEK_END);
    for (;;) {
        pthread_t thread;
        int fd = accept(listener, NULL, NULL);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes); /* on a Unix socket it fails, and is not needed */
        if (pthread_create(&thread, NULL, serve_connection, (void *)(intptr_t)fd)) return 1;
        pthread_detach(thread);
    }
}
