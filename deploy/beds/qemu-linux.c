/*
 * The one program of the bed `qemu-linux`: /init of its guests, 64-bit and 32-bit, without any library.
 *
 * It says on the serial line what the CPU is, starts workers that map memory in every way that user space has, and
 * lets them say what they mapped. A host that walks the guest's tables has to find exactly that.
 *
 *   cpu VENDOR MAXPHYADDR GIB-PAGES
 *   kallsyms ADDRESS BYTES
 *   task WORKER PID NAME
 *   map WORKER ADDRESS BYTES PAGE-BYTES RIGHTS SALT KEY STEP
 *   ready
 *
 * All numbers are hexadecimal, and NAME is bytes, two digits each. A worker's task has the worker's address space; another process
 * shares that of worker 0, and a thread, which is not told, that of worker 1. RIGHTS is what the tables have to grant to user space: r, w and x, or '-' for
 * each that is missing; '---' means that nothing is mapped. At each STEP from the start of the mapping lie eight bytes:
 * the address times GOLDEN, exclusive-or SALT; with SALT 0 they are zero. Every worker also has a page at IDENTITY
 * whose first eight bytes are MAGIC plus its number. With `kallsyms` as an argument, every worker has the kernel's symbols in
 * memory as well, the text of /proc/kallsyms.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long word;
typedef unsigned long long u64;

#define GOLDEN 0x9e3779b97f4a7c15ull
#define MAGIC 0x70616765776c6b00ull
#define IDENTITY 0x40000000ul
#define PLOT 0x41000000ul
#define PLOT_BYTES 0x100000ul
#define SYMBOLS 0x50000000ul
#define SYMBOLS_BYTES 0x2000000ul
#define HUGE 0x60000000ul
#define GIB 0x80000000ul
#define PAGE 0x1000ul
#define WORKERS 4

#define PR_SET_NAME 15
#define PR_GET_NAME 16
#define SIGCHLD 17
#define CLONE_VM 0x100
#define CLONE_SIGHAND 0x800
#define CLONE_THREAD 0x10000

#define PROT_READ 1
#define PROT_WRITE 2
#define PROT_EXEC 4
#define MAP_PRIVATE 0x02
#define MAP_SHARED 0x01
#define MAP_FIXED 0x10
#define MAP_ANONYMOUS 0x20
#define MAP_HUGETLB 0x40000
#define MAP_1GIB (30 << 26)

#ifdef __x86_64__
enum { READ = 0, WRITE = 1, OPEN = 2, MMAP = 9, MPROTECT = 10, MUNMAP = 11, PIPE = 22, SCHED_YIELD = 24, NANOSLEEP = 35,
       GETPID = 39, CLONE = 56, FORK = 57, PRCTL = 157, MOUNT = 165, PKEY_MPROTECT = 329, PKEY_ALLOC = 330 };

static long call5(long number, word a, word b, word c, word d, word e)
{
	register word r10 __asm__("r10") = d;
	register word r8 __asm__("r8") = e;
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
	return result;
}
#else
enum { FORK = 2, READ = 3, WRITE = 4, OPEN = 5, GETPID = 20, MOUNT = 21, PIPE = 42, MMAP = 90, MUNMAP = 91, CLONE = 120, MPROTECT = 125,
       SCHED_YIELD = 158, NANOSLEEP = 162, PRCTL = 172, PKEY_MPROTECT = 380, PKEY_ALLOC = 381 };

static long call5(long number, word a, word b, word c, word d, word e)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
	return result;
}
#endif

static long call(long number, word a, word b, word c, word d)
{
	return call5(number, a, b, c, d, 0);
}

static void sleep_ms(word milliseconds)
{
	word time[2] = { milliseconds / 1000, milliseconds % 1000 * 1000000 };

	call(NANOSLEEP, (word)time, 0, 0, 0);
}

/* One line, written with one system call, so that workers do not cut into each other's. */
struct line {
	char text[160];
	word length;
};

static void put(struct line *line, const char *text)
{
	while (*text && line->length < sizeof(line->text))
		line->text[line->length++] = *text++;
}

static void put_hex(struct line *line, u64 value)
{
	char digits[18];
	int at = sizeof(digits);

	digits[--at] = 0;
	do {
		digits[--at] = "0123456789abcdef"[value & 15];
		value >>= 4;
	} while (value);
	put(line, " ");
	put(line, digits + at);
}

static void say(struct line *line)
{
	put(line, "\n");
	call(WRITE, 1, (word)line->text, line->length, 0);
}

static void __attribute__((noreturn)) die(const char *what)
{
	struct line line = { .length = 0 };

	put(&line, "failed: ");
	put(&line, what);
	say(&line);
	for (;;)
		sleep_ms(1000);
}

/* Gives this task a name, and says what the kernel makes of it, and which number it has. */
static void introduce_task(int worker, const char *name)
{
	struct line line = { .length = 0 };
	char given[17] = { 0 };

	if (call(PRCTL, PR_SET_NAME, (word)name, 0, 0) || call(PRCTL, PR_GET_NAME, (word)given, 0, 0))
		die("prctl");
	put(&line, "task");
	put_hex(&line, worker);
	put_hex(&line, call(GETPID, 0, 0, 0, 0));
	put(&line, " ");
	for (const char *at = given; *at; at++) {
		const char digits[] = { "0123456789abcdef"[*at >> 4 & 15], "0123456789abcdef"[*at & 15], 0 };

		put(&line, digits);
	}
	say(&line);
}

/* Has a task that shares all memory run `task` on a stack of its own. */
static void share(word flags, void (*task)(void), u8 *stack_end)
{
	long result;

#ifdef __x86_64__
	register word r10 __asm__("r10") = 0;
	register word r8 __asm__("r8") = 0;

	__asm__ volatile("syscall\n test %%rax, %%rax\n jnz 1f\n xor %%ebp, %%ebp\n call *%%rbx\n ud2\n 1:"
			 : "=a"(result)
			 : "a"(CLONE), "b"(task), "D"(flags), "S"(stack_end), "d"(0), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
#else
	__asm__ volatile("int $0x80\n test %%eax, %%eax\n jnz 1f\n xor %%ebp, %%ebp\n call *%%esi\n ud2\n 1:"
			 : "=a"(result)
			 : "a"(CLONE), "b"(flags), "c"(stack_end), "d"(0), "S"(task)
			 : "memory");
#endif
	if (result < 0)
		die("clone");
}

static void cpuid(u32 leaf, u32 out[4])
{
	__asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(0));
}

/* What the CPU has that decides on the sizes of pages. */
struct sizes {
	int pae, gib;
};

/* What CPUID says of the meaning of a page-table entry. */
static struct sizes introduce(void)
{
	struct line line = { .length = 0 };
	struct sizes sizes;
	u32 out[4], last, width = 36, gib = 0;
	char vendor[13];

	cpuid(0, out);
	for (int at = 0; at < 4; at++) {
		vendor[at] = out[1] >> 8 * at;
		vendor[4 + at] = out[3] >> 8 * at;
		vendor[8 + at] = out[2] >> 8 * at;
	}
	vendor[12] = 0;
	cpuid(1, out);
	sizes.pae = out[3] >> 6 & 1;
	cpuid(0x80000000, out);
	last = out[0];
	if (last >= 0x80000001) {
		cpuid(0x80000001, out);
		gib = out[3] >> 26 & 1;
	}
	if (last >= 0x80000008) {
		cpuid(0x80000008, out);
		width = out[0] & 0xff;
	}
	put(&line, "cpu ");
	put(&line, vendor);
	put_hex(&line, width);
	put_hex(&line, gib);
	say(&line);
	sizes.gib = gib && sizeof(word) == 8;
	return sizes;
}

/* Maps anonymous memory at `address`; answers whether that went well. */
static int map(word address, word bytes, word flags)
{
	flags |= MAP_ANONYMOUS | MAP_FIXED | (flags & MAP_SHARED ? 0 : MAP_PRIVATE);
#ifdef __x86_64__
	register word r8 __asm__("r8") = -1;
	register word r9 __asm__("r9") = 0;
	register word r10 __asm__("r10") = flags;
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(MMAP), "D"(address), "S"(bytes), "d"(PROT_READ | PROT_WRITE),
			 "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
#else
	word arguments[6] = { address, bytes, PROT_READ | PROT_WRITE, flags, -1, 0 };
	long result = call(MMAP, (word)arguments, 0, 0, 0);
#endif
	return (word)result == address;
}

static u64 salt_of(int worker, int number)
{
	return ((u64)(worker + 1) << 32) + number + 1;
}

static void fill(word address, word bytes, word step, u64 salt)
{
	for (word at = address; at < address + bytes; at += step)
		*(volatile u64 *)at = at * GOLDEN ^ salt;
}

static void touch(word address, word bytes)
{
	for (word at = address; at < address + bytes; at += PAGE)
		*(volatile u8 *)at;
}

static void protect(word address, word bytes, word rights)
{
	if (call(MPROTECT, address, bytes, rights, 0))
		die("mprotect");
}

struct mapping {
	word address, bytes, page, step;
	const char *rights;
	u64 salt;
	u32 key;
};

static void announce(int worker, const struct mapping *it)
{
	struct line line = { .length = 0 };

	put(&line, "map");
	put_hex(&line, worker);
	put_hex(&line, it->address);
	put_hex(&line, it->bytes);
	put_hex(&line, it->page);
	put(&line, " ");
	put(&line, it->rights);
	put_hex(&line, it->salt);
	put_hex(&line, it->key);
	put_hex(&line, it->step);
	say(&line);
}

/* What a mapping goes through before it is announced. */
enum way { WRITTEN, READ_ONLY, EXECUTABLE, ALL, PARENTS, COPIED, FORBIDDEN, UNTOUCHED, ZERO, SHARED, KEYED, GONE, WAYS };

static const char *const rights_of[WAYS] = {
	[WRITTEN] = "rw-",   [READ_ONLY] = "r--", [EXECUTABLE] = "r-x", [ALL] = "rwx",  [PARENTS] = "r--", [COPIED] = "rw-",
	[FORBIDDEN] = "---", [UNTOUCHED] = "---", [ZERO] = "r--",	[SHARED] = "rw-", [KEYED] = "rw-",   [GONE] = "---",
};

static word plot(int way)
{
	return PLOT + way * PLOT_BYTES;
}

static const word plot_bytes = 16 * PAGE;

/* Before the workers are forked: what they inherit. Numbered as the mappings of a worker -1. */
static void bequeath(void)
{
	static const int inherited[] = { PARENTS, COPIED };

	for (int at = 0; at < 2; at++) {
		if (!map(plot(inherited[at]), plot_bytes, 0))
			die("mmap");
		fill(plot(inherited[at]), plot_bytes, PAGE / 2, salt_of(-1, inherited[at]));
	}
}

static void map_small(int worker)
{
	for (int way = 0; way < WAYS; way++) {
		struct mapping it = { plot(way), plot_bytes, PAGE, PAGE / 2, rights_of[way], salt_of(worker, way), 0 };

		if (way != PARENTS && way != COPIED && !map(it.address, it.bytes, way == SHARED ? MAP_SHARED : 0))
			die("mmap");
		if (way == PARENTS) {
			touch(it.address, it.bytes);
			it.salt = salt_of(-1, way);
		} else if (way == ZERO) {
			touch(it.address, it.bytes);
			it.salt = 0;
		} else if (way != UNTOUCHED) {
			fill(it.address, it.bytes, it.step, it.salt);
		}
		if (way == READ_ONLY)
			protect(it.address, it.bytes, PROT_READ);
		else if (way == EXECUTABLE)
			protect(it.address, it.bytes, PROT_READ | PROT_EXEC);
		else if (way == ALL)
			protect(it.address, it.bytes, PROT_READ | PROT_WRITE | PROT_EXEC);
		else if (way == FORBIDDEN)
			protect(it.address, it.bytes, 0);
		else if (way == GONE)
			call(MUNMAP, it.address, it.bytes, 0, 0);
		else if (way == KEYED) {
			long key = call(PKEY_ALLOC, 0, 0, 0, 0);

			if (key > 0 && !call(PKEY_MPROTECT, it.address, it.bytes, PROT_READ | PROT_WRITE, key))
				it.key = key;
		}
		if (way == ALL)
			fill(it.address, it.bytes, it.step, it.salt);
		announce(worker, &it);
	}
}

/* The kernel's symbols, as /proc/kallsyms gives them to root: where they are is inherited. */
static void read_symbols(void)
{
	struct line line = { .length = 0 };
	long file, bytes;
	word length = 0;

	if (call5(MOUNT, (word)"proc", (word)"/proc", (word)"proc", 0, 0))
		die("mount of /proc");
	file = call(OPEN, (word)"/proc/kallsyms", 0, 0, 0);
	if (file < 0 || !map(SYMBOLS, SYMBOLS_BYTES, 0))
		die("/proc/kallsyms");
	while ((bytes = call(READ, file, SYMBOLS + length, SYMBOLS_BYTES - length, 0)) > 0)
		length += bytes;
	if (bytes < 0 || length == SYMBOLS_BYTES)
		die("read of /proc/kallsyms");
	put(&line, "kallsyms");
	put_hex(&line, SYMBOLS);
	put_hex(&line, length);
	say(&line);
}

/* Two pages of the kernel's default huge size, one of them read-only; `page` bytes each. */
static void map_huge(int worker, word page)
{
	static const char *const rights[] = { "rw-", "r--" };

	for (int number = 0; number < 2; number++) {
		struct mapping it = { HUGE + number * page, page, page, PAGE / 2, rights[number], salt_of(worker, WAYS + number), 0 };

		if (!map(it.address, it.bytes, MAP_HUGETLB))
			die("mmap of a huge page");
		fill(it.address, it.bytes, it.step, it.salt);
		if (number)
			protect(it.address, it.bytes, PROT_READ);
		announce(worker, &it);
	}
}

static void map_gib(int worker)
{
	struct mapping it = { GIB, 1ul << 30, 1ul << 30, 1ul << 18, "rw-", salt_of(worker, WAYS + 2), 0 };

	/* A guest that was not told to set one aside has none. */
	if (!map(it.address, it.bytes, MAP_HUGETLB | MAP_1GIB))
		return;
	fill(it.address, it.bytes, it.step, it.salt);
	announce(worker, &it);
}

/* Names that a kernel takes: of a few letters, in UTF-8, of as many bytes as there may be, and of bytes that are no text. */
static const char *const names[WORKERS] = { "worker", "w\xc3\xb6rker", "fifteen-letters", "\xff\xfe\x1b[2J" };

static int said_ready[2];
static u8 stacks[2][0x2000] __attribute__((aligned(16)));

static void rest(void)
{
	u8 byte = 0;

	call(WRITE, said_ready[1], (word)&byte, 1, 0);
	for (;;)
		sleep_ms(1000);
}

static void twin(void)
{
	introduce_task(0, "twin");
	rest();
}

static void thread(void)
{
	call(PRCTL, PR_SET_NAME, (word)"thread", 0, 0);
	rest();
}

/* Keeps a vCPU busy, each worker in its own way: in user space, in the kernel, asleep, with page faults. */
static void __attribute__((noreturn)) work(int worker, const int *pipe)
{
	static u8 buffer[0x8000];
	volatile u32 count;

	for (;;) {
		for (count = 0; count < 20000; count++)
			;
		if (worker == 1) {
			call(WRITE, pipe[1], (word)buffer, sizeof(buffer), 0);
			call(READ, pipe[0], (word)buffer, sizeof(buffer), 0);
		} else if (worker == 2) {
			sleep_ms(3);
		} else if (worker == 3) {
			if (!map(plot(WAYS), 64 * PAGE, 0))
				die("mmap, again");
			fill(plot(WAYS), 64 * PAGE, PAGE, worker);
			call(MUNMAP, plot(WAYS), 64 * PAGE, 0, 0);
		}
	}
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

void begin(word *stack);

/* At the top of the stack lies the number of arguments, and behind it the arguments. */
void __attribute__((noreturn)) begin(word *stack)
{
	struct line line = { .length = 0 };
	struct sizes sizes = introduce();
	int pipe[2];
	u8 byte = 0;

	if (call(PIPE, (word)said_ready, 0, 0, 0) || call(PIPE, (word)pipe, 0, 0, 0))
		die("pipe");
	bequeath();
	for (word argument = 1; argument < stack[0]; argument++)
		if (same((const char *)stack[1 + argument], "kallsyms"))
			read_symbols();
	for (int worker = 0; worker < WORKERS; worker++) {
		long child = call(FORK, 0, 0, 0, 0);

		if (child < 0)
			die("fork");
		if (child)
			continue;
		if (!map(IDENTITY, PAGE, 0))
			die("mmap of the identity");
		*(volatile u64 *)IDENTITY = MAGIC + worker;
		introduce_task(worker, names[worker]);
		if (worker == 0)
			share(CLONE_VM | SIGCHLD, twin, stacks[0] + sizeof(stacks[0]));
		if (worker == 1)
			share(CLONE_VM | CLONE_SIGHAND | CLONE_THREAD, thread, stacks[1] + sizeof(stacks[1]));
		map_small(worker);
		map_huge(worker, sizes.pae ? 1ul << 21 : 1ul << 22);
		if (sizes.gib && worker == 0)
			map_gib(worker);
		call(WRITE, said_ready[1], (word)&byte, 1, 0);
		work(worker, pipe);
	}
	/* The workers, and the two that share. */
	for (int said = 0; said < WORKERS + 2; said++)
		call(READ, said_ready[0], (word)&byte, 1, 0);
	put(&line, "ready");
	say(&line);
	for (;;)
		sleep_ms(1000);
}

#ifdef __x86_64__
__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call begin\n");
#else
__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %esp, %eax\n and $-16, %esp\n sub $12, %esp\n push %eax\n call begin\n");
#endif
