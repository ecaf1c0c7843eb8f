//! Kernels of a few instructions, in the file format of real ones.

/// Bytes before the part that runs: boot sector and one sector of setup.
pub(crate) const SETUP: usize = 1024;

/// A bzImage whose 64-bit entry point is the first byte of `code`.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut kernel = vec![0; 0x200];
    kernel.extend(code);
    kernel.resize(kernel.len().next_multiple_of(16), 0);
    let mut file = vec![0; SETUP];
    let paragraphs = (kernel.len() / 16) as u32;
    // setup_sects, syssize, boot_flag, header, version, loadflags, code32_start, initrd_addr_max, kernel_alignment,
    // relocatable_kernel, xloadflags, cmdline_size, pref_address, init_size.
    let fields: [(usize, &[u8]); 14] = [
        (0x1f1, &[1]),
        (0x1f4, &paragraphs.to_le_bytes()),
        (0x1fe, &[0x55, 0xaa]),
        (0x202, b"HdrS"),
        (0x206, &[0x0f, 2]),
        (0x211, &[1]),
        (0x214, &0x10_0000_u32.to_le_bytes()),
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()),
        (0x230, &0x20_0000_u32.to_le_bytes()),
        (0x234, &[1]),
        (0x236, &[1, 0]),
        (0x238, &2047_u32.to_le_bytes()),
        (0x258, &0x100_0000_u64.to_le_bytes()),
        (0x260, &0x10_0000_u32.to_le_bytes()),
    ];
    for (at, bytes) in fields {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(kernel);
    file
}
