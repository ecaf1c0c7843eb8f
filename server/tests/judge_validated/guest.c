/*
 * A guest that maps one page of its own elsewhere, without pause: `mapping.rs` says how.
 */

typedef unsigned long u64;

#define MAPPED 0x200000ul
#define ASTRAY_PD 0x201000ul
#define ASTRAY_PT3 0x202000ul
#define ASTRAY_PT2 0x203000ul
#define TREES 0x210000ul
#define TREE_BYTES 0x4000ul
#define PAGE 0x1000ul
#define LINK 3ul

static void put(u64 gpa, u64 value)
{
	*(volatile u64 *)gpa = value;
}

void _start(void)
{
	u64 root, generation = 0;

	__asm__ volatile("mov %%cr3, %0" : "=r"(root));
	put(ASTRAY_PD, ASTRAY_PT3 | LINK);
	for (;;) {
		u64 number = ++generation % GENERATIONS << 12 | LINK;
		u64 tree = TREES + generation % 2 * TREE_BYTES;
		u64 last = TREES + (generation + 1) % 2 * TREE_BYTES;

		put(tree + 2 * PAGE, FRAME | number);
		put(tree + PAGE, (tree + 2 * PAGE) | LINK);
		put(tree, (tree + PAGE) | LINK);
		put((root & ~0xffful) + 8, tree | LINK);
		put(MAPPED, generation);
		put(ASTRAY_PT3, ASTRAY_3 | number);
		put(ASTRAY_PT2, ASTRAY_2 | number);
		put(last, ASTRAY_PD | LINK);
		put(last + PAGE, ASTRAY_PT2 | LINK);
		put(last + 2 * PAGE, ASTRAY_1 | number);
	}
}
