//! What a disk does (SBC-3).

use super::cdb::{Cdb, op};
use super::primary::PHYSICAL_EXPONENT;
use super::{DISK_BLOCK, Reply, Sense, UNMAP_BLOCKS, UNMAP_RANGES, WRITE_SAME_BLOCKS, Work, limited, span};
use crate::devices::virtio::requests::REQUEST_BYTES;

/// Bits of the second byte.
const PROTECT: u8 = 0xe0;
const FUA: u8 = 0x08;
const ANCHOR: u8 = 0x10;
const UNMAP: u8 = 0x08;
const LBDATA_PBDATA: u8 = 0x06;
const NDOB: u8 = 0x01;

/// A command of the table, on a disk of so many blocks.
pub(super) fn command(cdb: Cdb, parameters: &[u8], read_only: bool, blocks: u64) -> Result<Reply, Sense> {
    let writes = matches!(
        cdb.opcode(),
        op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 | op::WRITE_SAME_10 | op::WRITE_SAME_16 | op::UNMAP
    );
    if writes && read_only {
        return Err(Sense::WRITE_PROTECTED);
    }
    match cdb.opcode() {
        op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => {
            let (at, len) = transfer(cdb, blocks)?;
            Ok(if len == 0 { Reply::Data(Vec::new()) } else { Reply::Do(Work::Read { at, len }) })
        }
        op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => {
            let (at, len) = transfer(cdb, blocks)?;
            let durable = cdb.opcode() != op::WRITE_6 && cdb.bit(1, FUA);
            Ok(if len == 0 { Reply::Data(Vec::new()) } else { Reply::Do(Work::Write { at, len, durable }) })
        }
        op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => {
            let (at, len) = transfer(cdb, blocks)?;
            let compare = match cdb.byte(1) >> 1 & 3 {
                0 => false,
                1 => true,
                _ => return Err(Sense::INVALID_FIELD),
            };
            Ok(if len == 0 { Reply::Data(Vec::new()) } else { Reply::Do(Work::Verify { at, len, compare }) })
        }
        op::SYNCHRONIZE_CACHE_10 | op::SYNCHRONIZE_CACHE_16 => {
            let (first, number) = cdb.run();
            span(first, number, blocks, DISK_BLOCK)?;
            // All of it, whatever part is asked for.
            Ok(if read_only { Reply::Data(Vec::new()) } else { Reply::Do(Work::Flush) })
        }
        op::WRITE_SAME_10 | op::WRITE_SAME_16 => write_same(cdb, parameters, blocks),
        op::UNMAP => unmap(cdb, parameters, blocks),
        op::READ_CAPACITY_10 => {
            let last = u32::try_from(blocks.saturating_sub(1)).unwrap_or(u32::MAX);
            Ok(Reply::Data([last.to_be_bytes(), (DISK_BLOCK as u32).to_be_bytes()].concat()))
        }
        op::SERVICE_ACTION_IN_16 => {
            let mut data = vec![0; 32];
            data[..8].copy_from_slice(&blocks.saturating_sub(1).to_be_bytes());
            data[8..12].copy_from_slice(&(DISK_BLOCK as u32).to_be_bytes());
            data[13] = PHYSICAL_EXPONENT;
            // Thin; what is unmapped reads as zeroes.
            data[14] = if read_only { 0 } else { 0xc0 };
            limited(data, cdb.number(10, 4))
        }
        op::START_STOP_UNIT => {
            // There is nothing to eject, and nothing that turns.
            if cdb.bit(4, 0x02) { Err(Sense::INVALID_FIELD) } else { Ok(Reply::Data(Vec::new())) }
        }
        op::PREVENT_ALLOW => Ok(Reply::Data(Vec::new())),
        _ => Err(Sense::INVALID_OPCODE),
    }
}

/// Where a command that reads or writes a run of blocks does so.
fn transfer(cdb: Cdb, blocks: u64) -> Result<(u64, u64), Sense> {
    // In the six bytes' form these bits are the address's.
    let six = cdb.opcode() >> 5 == 0;
    if !six && cdb.bit(1, PROTECT) {
        return Err(Sense::INVALID_FIELD);
    }
    let (first, number) = cdb.run();
    let (at, len) = span(first, number, blocks, DISK_BLOCK)?;
    if len > REQUEST_BYTES { Err(Sense::INVALID_FIELD) } else { Ok((at, len)) }
}

fn write_same(cdb: Cdb, parameters: &[u8], blocks: u64) -> Result<Reply, Sense> {
    let (first, number) = cdb.run();
    let none = cdb.opcode() == op::WRITE_SAME_16 && cdb.bit(1, NDOB);
    // (A number of 0 would mean all that follows: the block limits page says that it does not.)
    if cdb.bit(1, PROTECT | ANCHOR | LBDATA_PBDATA) || number == 0 || number > WRITE_SAME_BLOCKS {
        return Err(Sense::INVALID_FIELD);
    }
    let (at, len) = span(first, number, blocks, DISK_BLOCK)?;
    let block = if none { &[0; DISK_BLOCK as usize][..] } else { parameters };
    if block.len() != DISK_BLOCK as usize {
        return Err(Sense::PARAMETER_LENGTH);
    }
    Ok(Reply::Do(if block.iter().all(|byte| *byte == 0) {
        Work::Zero { runs: vec![(first, number)], unmap: cdb.bit(1, UNMAP) }
    } else {
        Work::Fill { at, len, block: block.to_vec() }
    }))
}

/// SBC-3, 5.28.
fn unmap(cdb: Cdb, parameters: &[u8], blocks: u64) -> Result<Reply, Sense> {
    if cdb.bit(1, 1) {
        // ANCHOR.
        return Err(Sense::INVALID_FIELD);
    }
    let len = cdb.number(7, 2);
    if len == 0 {
        return Ok(Reply::Data(Vec::new()));
    }
    let list = Cdb(parameters);
    let descriptors = list.number(2, 2) as usize;
    if len < 8 || parameters.len() < 8 {
        return Err(Sense::PARAMETER_LENGTH);
    }
    if descriptors / 16 > UNMAP_RANGES {
        return Err(Sense::INVALID_PARAMETER);
    }
    let (body, _) = parameters[8..].split_at(descriptors.min(parameters.len() - 8));
    let (mut runs, mut total) = (Vec::new(), 0u64);
    for descriptor in body.as_chunks::<16>().0 {
        let descriptor = Cdb(descriptor);
        let (first, number) = (descriptor.number(0, 8), descriptor.number(8, 4));
        span(first, number, blocks, DISK_BLOCK)?;
        total = total.saturating_add(number);
        if number > 0 {
            runs.push((first, number));
        }
    }
    if total > UNMAP_BLOCKS {
        return Err(Sense::INVALID_PARAMETER);
    }
    Ok(if runs.is_empty() { Reply::Data(Vec::new()) } else { Reply::Do(Work::Zero { runs, unmap: true }) })
}
