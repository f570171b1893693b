//! The SCSI commands that an initiator sends to a disk (SPC-4, SBC-3), as bytes, and what their answers say.

/// PERSISTENT RESERVE IN: READ KEYS.
pub const READ_KEYS: u8 = 0;
/// PERSISTENT RESERVE IN: READ RESERVATION.
pub const READ_RESERVATION: u8 = 1;
/// PERSISTENT RESERVE OUT: RESERVE.
pub const RESERVE: u8 = 1;
/// PERSISTENT RESERVE OUT: PREEMPT.
pub const PREEMPT: u8 = 4;
/// PERSISTENT RESERVE OUT: PREEMPT AND ABORT.
pub const PREEMPT_AND_ABORT: u8 = 5;
/// PERSISTENT RESERVE OUT: REGISTER AND IGNORE EXISTING KEY.
pub const REGISTER_AND_IGNORE: u8 = 6;

fn long(operation: u8, flags: u8, lba: u64, blocks: u32) -> Vec<u8> {
    let mut cdb = vec![operation, flags];
    cdb.extend(lba.to_be_bytes());
    cdb.extend(blocks.to_be_bytes());
    cdb.extend([0, 0]);
    cdb
}

/// READ (16), SBC-3 §5.10.
pub fn read(lba: u64, blocks: u32) -> Vec<u8> {
    long(0x88, 0, lba, blocks)
}

/// WRITE (16), SBC-3 §5.33.
pub fn write(lba: u64, blocks: u32) -> Vec<u8> {
    long(0x8a, 0, lba, blocks)
}

/// WRITE SAME (16), SBC-3 §5.46.
pub fn write_same(lba: u64, blocks: u32, unmap: bool) -> Vec<u8> {
    long(0x93, if unmap { 0x08 } else { 0 }, lba, blocks)
}

/// SYNCHRONIZE CACHE (16) of everything, SBC-3 §5.22.
pub fn synchronize_cache() -> Vec<u8> {
    long(0x91, 0, 0, 0)
}

/// READ CAPACITY (16), SBC-3 §5.16.
pub fn read_capacity() -> Vec<u8> {
    let mut cdb = long(0x9e, 0x10, 0, 32);
    cdb.truncate(16);
    cdb
}

/// INQUIRY of the vital product data page Block Limits, SBC-3 §6.6.4.
pub fn block_limits(len: u8) -> Vec<u8> {
    vec![0x12, 1, 0xb0, 0, len, 0]
}

/// PERSISTENT RESERVE IN, SPC-4 §6.15.
pub fn reserve_in(action: u8, len: usize) -> Vec<u8> {
    let [high, low] = u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
    vec![0x5e, action, 0, 0, 0, 0, 0, high, low, 0]
}

/// PERSISTENT RESERVE OUT and its parameter list, SPC-4 §6.16.
pub fn reserve_out(action: u8, key: u64, action_key: u64, aptpl: bool) -> (Vec<u8>, [u8; 24]) {
    let mut parameters = [0; 24];
    parameters[..8].copy_from_slice(&key.to_be_bytes());
    parameters[8..16].copy_from_slice(&action_key.to_be_bytes());
    parameters[20] = u8::from(aptpl);
    (vec![0x5f, action, crate::reservation::TYPE, 0, 0, 0, 0, 0, 24, 0], parameters)
}

/// What READ CAPACITY (16) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Blocks.
    pub blocks: u64,
    /// Bytes in each.
    pub block: u32,
    /// What is unmapped reads as zeroes (LBPME and LBPRZ).
    pub unmaps_to_zeroes: bool,
}

/// Parse it; `None`: it makes no sense.
pub fn parse_capacity(data: &[u8]) -> Option<Capacity> {
    let last = u64::from_be_bytes(data.get(..8)?.try_into().ok()?);
    let block = u32::from_be_bytes(data.get(8..12)?.try_into().ok()?);
    let blocks = last.checked_add(1)?;
    blocks.checked_mul(block.into())?;
    (block > 0).then_some(Capacity { blocks, block, unmaps_to_zeroes: data.get(14)? & 0xc0 == 0xc0 })
}

/// The page Block Limits: most blocks in a transfer, most in a WRITE SAME; zero: it sets no limit, or says nothing.
pub fn parse_block_limits(data: &[u8]) -> (u32, u64) {
    let is_it = data.get(1) == Some(&0xb0);
    let transfer = data.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    let same = data.get(36..44).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    if is_it { (transfer, same) } else { (0, 0) }
}

/// A sense key and additional sense code in words, as far as they come up.
pub fn sense(key: u8, ascq: u16) -> String {
    let word = match key {
        1 => "recovered error",
        2 => "not ready",
        3 => "medium error",
        4 => "hardware error",
        5 => "illegal request",
        6 => "unit attention",
        7 => "data protect",
        0xb => "aborted command",
        _ => "an error",
    };
    format!("{word} (sense key {key:#x}, additional sense code {:#04x}/{:#04x})", ascq >> 8, ascq & 0xff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_the_standards_bytes() {
        assert_eq!(read(0x0102_0304_0506_0708, 9), [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 9, 0, 0]);
        assert_eq!(write(1, 2)[0], 0x8a);
        assert_eq!(write_same(1, 2, true)[..2], [0x93, 8]);
        assert_eq!(read_capacity(), [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]);
        let (cdb, parameters) = reserve_out(REGISTER_AND_IGNORE, 0, 0x0102, true);
        assert_eq!(cdb, [0x5f, 6, 5, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!((parameters[14], parameters[15], parameters[20]), (1, 2, 1));
    }

    #[test]
    fn capacities_that_make_no_sense_are_none() {
        let mut data = [0; 32];
        (data[7], data[10], data[14]) = (9, 2, 0xc0);
        assert_eq!(parse_capacity(&data), Some(Capacity { blocks: 10, block: 512, unmaps_to_zeroes: true }));
        assert_eq!(parse_capacity(&data[..14]), None);
        assert_eq!(parse_capacity(&[0xff; 32]), None);
        assert_eq!(parse_capacity(&[0; 32]), None);
        assert_eq!(parse_block_limits(&[0; 3]), (0, 0));
    }
}
