//! Answers as they come from outside: a mail as a mail server pipes it, the JSON of a hook. They say what somebody wants; whether it
//! counts, the code decides, and nothing else: senders can be forged.

use mail_parser::MessageParser;
use mail_parser::decoders::html::html_to_text;
use serde::Deserialize;

use crate::alarm::cut;
use crate::approval::{Answer, Code};

/// Longest mail, or body of a hook, that is read, in bytes.
pub const MAX_REPLY: usize = 1 << 20;

/// What somebody answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Yes or no.
    pub answer: Answer,
    /// Which question.
    pub id: String,
    /// The code, as it was typed.
    pub code: String,
}

/// Why there is no answer in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Out of office, or a mail that could not be delivered.
    #[error("a program wrote this mail (Auto-Submitted: {0}): it is not an answer")]
    Automatic(String),
    /// Not a mail.
    #[error("this is not a mail (RFC 5322)")]
    NotMail,
    /// Too long.
    #[error("this is longer than {MAX_REPLY} bytes and was not read")]
    Long,
    /// Not JSON.
    #[error(
        "this is not the JSON of a hook: {0}. Send {{\"answer\": \"approve\", \"id\": \"…\", \"code\": \"…\"}} or {{\"text\": \"APPROVE ID CODE\"}}"
    )]
    NotJson(String),
    /// Something else.
    #[error("the answer begins with {0:?}; its first line must be `APPROVE ID CODE` or `REFUSE ID CODE`")]
    Words(String),
}

/// The first line that somebody wrote himself: `APPROVE ID CODE` or `REFUSE ID CODE`.
///
/// Quoted lines are passed over; the first other line decides. What follows it is not looked at: below stands what was asked, with both
/// words in it.
pub fn from_text(text: &str) -> Result<Reply, NoAnswer> {
    let own = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with(['>', '|']));
    let line = own.unwrap_or_default();
    let wrong = || NoAnswer::Words(cut(line.to_owned(), 80));
    let mut words = line.split_whitespace();
    let answer = match words.next().unwrap_or_default().trim_end_matches([':', ',', '.']).to_ascii_lowercase().as_str()
    {
        "approve" => Answer::Approve,
        "refuse" => Answer::Refuse,
        _ => return Err(wrong()),
    };
    let id = words.next().ok_or_else(wrong)?.to_owned();
    let rest = words.collect::<String>();
    let code = rest.trim_end_matches('.');
    // Anything behind the code might take back what stands before it.
    if Code::parse(code).is_none() {
        return Err(wrong());
    }
    Ok(Reply { answer, id, code: code.to_owned() })
}

/// From a mail.
pub fn from_mail(bytes: &[u8]) -> Result<Reply, NoAnswer> {
    if bytes.len() > MAX_REPLY {
        return Err(NoAnswer::Long);
    }
    let mail = MessageParser::default().parse(bytes).ok_or(NoAnswer::NotMail)?;
    // RFC 3834: "no" is a person.
    if let Some(automatic) = mail.header_raw("Auto-Submitted").map(str::trim)
        && !automatic.eq_ignore_ascii_case("no")
    {
        return Err(NoAnswer::Automatic(cut(automatic.to_owned(), 80)));
    }
    let empty = || NoAnswer::Words(String::new());
    let part = mail.text_bodies().next().ok_or_else(empty)?;
    if part.is_text_html() {
        return from_text(&html_text(part.text_contents().ok_or_else(empty)?));
    }
    from_text(part.text_contents().ok_or_else(empty)?)
}

/// HTML as text, with a line for each block: what is quoted does not follow the answer in one line.
fn html_text(html: &str) -> String {
    let mut lines = html.to_owned();
    for block in ["<div", "<p", "<blockquote", "<tr", "<li", "<hr"] {
        for tag in [block.to_owned(), block.to_uppercase()] {
            lines = lines.replace(&tag, &format!("<br>{tag}"));
        }
    }
    html_to_text(&lines)
}

/// From a hook: the three parts, or the text of a short message under one of the names that gateways have for it.
pub fn from_hook(bytes: &[u8]) -> Result<Reply, NoAnswer> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Parts {
            answer: Answer,
            id: String,
            code: String,
        },
        Text {
            #[serde(alias = "body", alias = "message", alias = "Body")]
            text: String,
        },
    }
    if bytes.len() > MAX_REPLY {
        return Err(NoAnswer::Long);
    }
    match serde_json::from_slice(bytes).map_err(|e| NoAnswer::NotJson(cut(e.to_string(), 200)))? {
        Form::Parts { answer, id, code } => Ok(Reply { answer, id, code }),
        Form::Text { text } => from_text(&text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yes() -> Reply {
        Reply { answer: Answer::Approve, id: "n1-17".into(), code: "DBPB-3551".into() }
    }

    #[test]
    fn the_first_line_of_ones_own_decides() {
        let quoted = "\n> REFUSE n1-17 DBPB-3551\n\nApprove n1-17 DBPB-3551\n\n> REFUSE n1-17 DBPB-3551\n";
        assert_eq!(from_text(quoted).unwrap(), yes());
        let below = "APPROVE n1-17 DBPB 3551\n-----Original Message-----\n    REFUSE n1-17 DBPB-3551\n";
        assert_eq!(from_text(below).unwrap().code, "DBPB3551");
        assert_eq!(from_text("refuse: n1-17 DBPB-3551.").unwrap(), Reply { answer: Answer::Refuse, ..yes() });
    }

    #[test]
    fn anything_else_is_no_answer() {
        for text in [
            "",
            "Yes please\nAPPROVE n1-17 DBPB-3551",
            "APPROVE",
            "APPROVE n1-17",
            "APPROVE n1-17 DBPB-3551 or rather not",
            "do not APPROVE n1-17 DBPB-3551",
        ] {
            assert!(matches!(from_text(text), Err(NoAnswer::Words(_))), "{text}");
        }
    }

    #[test]
    fn a_mail_is_read_whatever_it_is_wrapped_in() {
        let plain = b"From: a@b\r\nTo: c@d\r\nSubject: Re: x\r\n\r\nAPPROVE n1-17 DBPB-3551\r\n> text\r\n";
        assert_eq!(from_mail(plain).unwrap(), yes());
        let mime = b"From: a@b\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary=x\r\n\r\n--x\r\n\
            Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: base64\r\n\r\nQVBQUk9WRSBuMS0xNyBEQlBCLTM1NTENCg==\r\n\
            --x\r\nContent-Type: text/html\r\n\r\n<p>REFUSE n1-17 DBPB-3551</p>\r\n--x--\r\n";
        assert_eq!(from_mail(mime).unwrap(), yes());
        let html = b"From: a@b\r\nContent-Type: text/html\r\n\r\n<html><body><div>APPROVE n1-17 DBPB-3551</div><blockquote>REFUSE n1-17 DBPB-3551</blockquote></body></html>";
        assert_eq!(from_mail(html).unwrap(), yes());
    }

    #[test]
    fn a_program_that_answers_is_nobody() {
        let mail = b"From: a@b\r\nAuto-Submitted: auto-replied\r\n\r\nAPPROVE n1-17 DBPB-3551\r\n";
        assert_eq!(from_mail(mail), Err(NoAnswer::Automatic("auto-replied".into())));
        assert!(from_mail(b"").is_err());
        assert_eq!(from_mail(&vec![b'a'; MAX_REPLY + 1]), Err(NoAnswer::Long));
    }

    #[test]
    fn a_hook_says_it_in_parts_or_as_a_short_message() {
        let parts = br#"{"answer": "approve", "id": "n1-17", "code": "DBPB-3551", "more": 1}"#;
        assert_eq!(from_hook(parts).unwrap(), yes());
        for name in ["text", "body", "message", "Body"] {
            let hook = format!("{{\"{name}\": \"approve n1-17 DBPB-3551\", \"from\": \"+49\"}}");
            assert_eq!(from_hook(hook.as_bytes()).unwrap(), yes());
        }
        for bad in [&b"{}"[..], b"[]", b"", b"{\"answer\": \"maybe\", \"id\": \"a\", \"code\": \"b\"}"] {
            assert!(matches!(from_hook(bad), Err(NoAnswer::NotJson(_))));
        }
    }
}
