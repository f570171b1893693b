//! The least ISO 9660 image (ECMA-119): one volume, one directory, one file. For tests of CD-ROM drives; a real image needs a real tool.

const BLOCK: usize = 2048;
/// Where things are, in blocks. The first 16 are the system's.
const VOLUME: usize = 16;
const END: usize = 17;
const PATHS_LITTLE: usize = 18;
const PATHS_BIG: usize = 19;
const ROOT: usize = 20;
const FILE: usize = 21;

/// An image whose file (`HELLO.TXT`, which Linux shows as `hello.txt`) has this content.
#[must_use]
pub fn image(volume: &str, content: &[u8]) -> Vec<u8> {
    let blocks = FILE + content.len().div_ceil(BLOCK).max(1);
    let mut image = vec![0; blocks * BLOCK];
    let mut put = |block: usize, at: usize, bytes: &[u8]| {
        image[block * BLOCK + at..][..bytes.len()].copy_from_slice(bytes);
    };
    let both32 = |n: usize| [(n as u32).to_le_bytes(), (n as u32).to_be_bytes()].concat();
    let both16 = |n: u16| [n.to_le_bytes(), n.to_be_bytes()].concat();
    // A directory record (9.1); `.` and `..` are the names 0 and 1.
    let record = |name: &[u8], block: usize, bytes: usize, directory: bool| {
        let len = (33 + name.len()).next_multiple_of(2);
        let mut record = vec![len as u8, 0];
        record.extend(both32(block));
        record.extend(both32(bytes));
        record.extend([126, 11, 22, 0, 0, 0, 0, u8::from(directory) * 2, 0, 0]);
        record.extend(both16(1));
        record.push(name.len() as u8);
        record.extend(name);
        record.resize(len, 0);
        record
    };
    let padded = |text: &str, len: usize| format!("{text:len$}").into_bytes();
    // The primary volume descriptor (8.4).
    put(VOLUME, 0, b"\x01CD001\x01\0");
    put(VOLUME, 8, &padded("", 32));
    put(VOLUME, 40, &padded(volume, 32));
    put(VOLUME, 80, &both32(blocks));
    put(VOLUME, 120, &both16(1));
    put(VOLUME, 124, &both16(1));
    put(VOLUME, 128, &both16(BLOCK as u16));
    put(VOLUME, 132, &both32(10));
    put(VOLUME, 140, &(PATHS_LITTLE as u32).to_le_bytes());
    put(VOLUME, 148, &(PATHS_BIG as u32).to_be_bytes());
    put(VOLUME, 156, &record(&[0], ROOT, BLOCK, true));
    put(VOLUME, 190, &padded("", 623));
    for date in 0..4 {
        put(VOLUME, 813 + 17 * date, b"0000000000000000\0");
    }
    put(VOLUME, 881, &[1]);
    put(END, 0, b"\xffCD001\x01");
    // The path tables (9.4): the root, its own parent.
    put(PATHS_LITTLE, 0, &[1, 0, ROOT as u8, 0, 0, 0, 1, 0, 0, 0]);
    put(PATHS_BIG, 0, &[1, 0, 0, 0, 0, ROOT as u8, 0, 1, 0, 0]);
    let directory = [
        record(&[0], ROOT, BLOCK, true),
        record(&[1], ROOT, BLOCK, true),
        record(b"HELLO.TXT;1", FILE, content.len(), false),
    ];
    put(ROOT, 0, &directory.concat());
    put(FILE, 0, content);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_as_large_as_it_says_and_holds_its_file() {
        let image = image("TEST", &[7; 5000]);
        assert_eq!(image.len(), 24 * BLOCK);
        assert_eq!(&image[VOLUME * BLOCK + 1..][..5], b"CD001");
        assert_eq!(image[VOLUME * BLOCK + 80..][..4], 24u32.to_le_bytes());
        assert_eq!(image[FILE * BLOCK..][..5000], [7; 5000]);
    }
}
