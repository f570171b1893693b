//! The management network's view: the cluster's membership, as `crm_mon --one-shot --output-as=xml` prints it.

use std::collections::BTreeMap;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// A node in the membership.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// It is there.
    Online,
    /// It left by itself, or has been fenced: nobody waits for it.
    Left,
    /// It is not there, and nothing has confirmed what has become of it.
    Lost,
}

/// Read `<nodes><node name= online= unclean= type=/>…`. Remote and guest nodes are not Corosync's and left out.
pub fn members(text: &str) -> Result<BTreeMap<String, Member>, String> {
    let mut reader = Reader::from_str(text);
    let mut members = BTreeMap::new();
    let (mut depth, mut inside, mut any) = (0_usize, None, false);
    loop {
        let event = reader.read_event().map_err(|e| format!("crm_mon's answer is unreadable: {e}"))?;
        match &event {
            Event::Start(element) => {
                any = true;
                depth += 1;
                match element.name().as_ref() {
                    // The same names occur elsewhere too, deeper.
                    b"nodes" if depth == 2 => inside = Some(depth),
                    b"node" if inside == Some(depth - 1) => members.extend(member(element)?),
                    _ => {}
                }
            }
            Event::Empty(element) => {
                any = true;
                if element.name().as_ref() == b"node" && inside == Some(depth) {
                    members.extend(member(element)?);
                }
            }
            Event::End(_) => {
                if inside == Some(depth) {
                    inside = None;
                }
                depth = depth.saturating_sub(1);
            }
            Event::Eof if any && depth == 0 => return Ok(members),
            Event::Eof => return Err("crm_mon's answer ends too early".into()),
            _ => {}
        }
    }
}

fn member(element: &BytesStart<'_>) -> Result<Option<(String, Member)>, String> {
    let value = |name: &str| -> Result<Option<String>, String> {
        let attribute = element.try_get_attribute(name).map_err(|e| format!("crm_mon's answer is unreadable: {e}"))?;
        attribute
            .map(|a| a.unescape_value().map(|v| v.into_owned()))
            .transpose()
            .map_err(|e| format!("crm_mon's answer is unreadable: {e}"))
    };
    if value("type")?.is_some_and(|kind| kind != "member") {
        return Ok(None);
    }
    let Some(name) = value("name")? else { return Ok(None) };
    let yes = |name: &str| Ok::<bool, String>(value(name)?.as_deref() == Some("true"));
    let member = match (yes("online")?, yes("unclean")?) {
        // Online and unclean: it is about to be fenced, because something on it could not be stopped. It is a member.
        (true, _) => Member::Online,
        (false, true) => Member::Lost,
        (false, false) => Member::Left,
    };
    Ok(Some((name, member)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"<pacemaker-result api-version="2.25"><summary/><nodes>
        <node name="n1" online="true" unclean="false" type="member"><resource id="x"><node name="no" online="true"/></resource></node>
        <node name="n2" online="false" unclean="true" type="member"/>
        <node name="n3" online="false" unclean="false" type="member"/>
        <node name="b1" online="true" unclean="false" type="remote"/>
        </nodes><resources><resource><node name="n9" online="true"/></resource></resources></pacemaker-result>"#;

    #[test]
    fn who_left_by_itself_is_not_lost() {
        let found = members(TEXT).unwrap();
        let expected = [("n1", Member::Online), ("n2", Member::Lost), ("n3", Member::Left)];
        assert_eq!(found, expected.map(|(n, m)| (n.to_owned(), m)).into());
    }

    #[test]
    fn what_is_no_answer_is_said_to_be_none() {
        for text in ["", "Connection to cluster failed", "<a", "<a><nodes>", "<a><nodes><node name='&x;'/></nodes></a>"]
        {
            assert!(members(text).is_err(), "{text}");
        }
        assert_eq!(members("<a/>"), Ok(BTreeMap::new()));
    }
}
