//! The code with which somebody answers: short enough to be typed from a telephone, bound to all that was asked.
//!
//! It is the first 40 bits of an HMAC-SHA-256 over the question and the recipient, with a key that is derived from the
//! cluster's, as eight letters and digits in Crockford's base 32 (without I, L, O and U). Whoever does not have the key can only
//! guess: [`MAX_WRONG`](super::MAX_WRONG) guesses are taken, so that with ten approvers the odds of a forged answer are
//! 50 in 2^40, one in twenty thousand million. Nothing can be tried out without asking the cluster.
//!
//! Every recipient has a code of his own: the code says who answered.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use understudy_protocol::key::Key;

use super::Request;

/// Bytes of the HMAC that the code shows.
const BYTES: usize = 5;
/// Crockford's base 32.
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// Keys of other purposes are derived with other words.
const PURPOSE: &[u8] = b"understudy approval 1";

/// What a person typed, as bits. Says nothing of whether it is right.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code([u8; BYTES]);

impl std::fmt::Debug for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Code(…)")
    }
}

impl Code {
    /// Read a code. Case, blanks and dashes say nothing; O is read as 0, I and L as 1, as Crockford has it.
    pub fn parse(text: &str) -> Option<Self> {
        let (mut bits, mut digits) = (0u64, 0);
        for c in text.chars().filter(|c| !matches!(c, ' ' | '-')) {
            let c = match c.to_ascii_uppercase() {
                'O' => '0',
                'I' | 'L' => '1',
                c => c,
            };
            let value = ALPHABET.iter().position(|a| char::from(*a) == c)?;
            digits += 1;
            if digits > 8 {
                return None;
            }
            bits = bits << 5 | value as u64;
        }
        let [_, _, _, bytes @ ..] = bits.to_be_bytes();
        (digits == 8).then_some(Self(bytes))
    }
}

#[cfg(test)]
impl Code {
    pub(super) fn from_bytes(bytes: [u8; BYTES]) -> Self {
        Self(bytes)
    }

    pub(super) fn flip(&mut self, bit: usize) {
        self.0[bit / 8] ^= 1 << (bit % 8);
    }
}

/// `ABCD-EFGH`
impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bits = self.0.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
        for digit in 0..8 {
            let value = (bits >> (35 - 5 * digit)) & 31;
            write!(f, "{}{}", if digit == 4 { "-" } else { "" }, char::from(ALPHABET[value as usize]))?;
        }
        Ok(())
    }
}

/// The code of this recipient for this question.
pub fn code(key: &Key, request: &Request, recipient: &str) -> Code {
    let mut code = [0; BYTES];
    code.copy_from_slice(&mac(key, request, recipient).finalize().into_bytes()[..BYTES]);
    Code(code)
}

/// Whose code it is, among those who may answer this question. Takes the same time whoever it is, and if it is nobody.
pub fn whose<'a>(key: &Key, request: &'a Request, code: Code) -> Option<&'a str> {
    let mut found = None;
    for recipient in &request.approvers {
        let is = mac(key, request, recipient).verify_truncated_left(&code.0).is_ok();
        found = if is { Some(recipient.as_str()) } else { found };
    }
    found
}

fn mac(key: &Key, request: &Request, recipient: &str) -> Hmac<Sha256> {
    let own = keyed(key.bytes()).chain_update(PURPOSE).finalize().into_bytes();
    // Exhaustive: what is asked and not covered does not compile.
    let Request { id, plan, summary, asked, expires, approvers: _ } = request;
    let mut mac = keyed(&own);
    for field in [id.as_bytes(), plan.as_bytes(), summary.as_bytes(), recipient.as_bytes()] {
        // With the length in front, no two questions are the same bytes.
        mac.update(&(field.len() as u64).to_be_bytes());
        mac.update(field);
    }
    mac.chain_update(asked.to_be_bytes()).chain_update(expires.to_be_bytes())
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    // RFC 2104: a key of any length.
    Hmac::<Sha256>::new_from_slice(key).unwrap_or_else(|_| unreachable!("HMAC takes keys of any length"))
}
