//! A small tree over quick-xml: the answers of `cibadmin` and `crm_mon` are read as a whole and asked several things.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// An element with its attributes and children. Text is not kept: Pacemaker says everything in attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Element {
    /// Tag.
    pub name: String,
    attributes: Vec<(String, String)>,
    /// Child elements in order.
    pub children: Vec<Element>,
}

/// Deepest nesting that is read; a CIB has about ten levels.
const MAX_DEPTH: usize = 100;

impl Element {
    /// Read a document; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Element> = vec![Element::default()];
        loop {
            match reader.read_event().map_err(|e| format!("broken XML at byte {}: {e}", reader.buffer_position()))? {
                Event::Start(start) if open.len() < MAX_DEPTH => open.push(Self::of(&start)?),
                Event::Start(_) => return Err(format!("XML nested deeper than {MAX_DEPTH} elements")),
                Event::Empty(start) => {
                    let element = Self::of(&start)?;
                    if let Some(parent) = open.last_mut() {
                        parent.children.push(element);
                    }
                }
                Event::End(_) => {
                    // quick-xml has checked that the end matches a start, so there is a parent.
                    let element = open.pop().unwrap_or_default();
                    match open.last_mut() {
                        Some(parent) => parent.children.push(element),
                        None => return Err("XML ends more elements than it starts".into()),
                    }
                }
                Event::Eof => break,
                _ => {}
            }
        }
        if open.len() != 1 {
            return Err("XML ends in the middle of an element".into());
        }
        let root = open.pop().unwrap_or_default();
        root.children.into_iter().next().ok_or_else(|| "no XML element".to_owned())
    }

    fn of(start: &BytesStart<'_>) -> Result<Self, String> {
        let mut attributes = Vec::new();
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|e| e.to_string())?;
            let value = attribute.unescape_value().map_err(|e| e.to_string())?.into_owned();
            attributes.push((String::from_utf8_lossy(attribute.key.as_ref()).into_owned(), value));
        }
        let name = String::from_utf8_lossy(start.name().as_ref()).into_owned();
        Ok(Self { name, attributes, children: Vec::new() })
    }

    /// Value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// Children with this tag.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |c| c.name == name)
    }

    /// Elements at the end of a path of tags.
    pub fn at(&self, path: &[&str]) -> Vec<&Element> {
        path.iter().fold(vec![self], |here, tag| {
            here.iter().flat_map(|e| e.children.iter()).filter(|c| c.name == *tag).collect()
        })
    }

    /// This element and everything in it, parents first.
    pub fn descendants(&self) -> Vec<&Element> {
        let mut found = vec![self];
        let mut next = 0;
        while next < found.len() {
            let element = found[next];
            found.extend(element.children.iter());
            next += 1;
        }
        found
    }
}

/// `text` as it must stand in an attribute's value.
pub fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_found_by_path_and_attributes_are_unescaped() {
        let e = Element::parse("<?xml version='1.0'?><a x='1 &lt; 2'><b><c n='1'/></b><b><c n='2'/>t</b></a>").unwrap();
        assert_eq!(e.attribute("x"), Some("1 < 2"));
        let numbers: Vec<_> = e.at(&["b", "c"]).iter().filter_map(|c| c.attribute("n")).collect();
        assert_eq!(numbers, ["1", "2"]);
        assert_eq!(e.descendants().len(), 5);
    }

    #[test]
    fn broken_documents_are_errors() {
        for bad in ["", "text", "<a>", "<a></b>", "</a>", "<a x=1/>", &"<a>".repeat(500)] {
            assert!(Element::parse(bad).is_err(), "{bad:?}");
        }
    }
}
